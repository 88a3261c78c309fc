"""Segmentation networks by name."""

import inspect

import flax.linen as nn
import jax.numpy as jnp

from pspnet_jax.models.pspnet import PSPNet, VGGPSPNetBlog

MODELS = {
    'pspnet': PSPNet,
    'vgg_pspnet_blog': VGGPSPNetBlog,
}


def create(name: str, *, dtype: str = 'float32', **options) -> nn.Module:
    """The network `name` as a Flax module: B H W C float -> {'logits': B H W K, ...}.

    `options` are plain values (the config's `model` section); those that the network
    does not have are left out, so that one section serves every network. Parameters,
    BatchNorm statistics and logits are float32 whatever `dtype` computes in.
    Raises ValueError for an unknown name or fewer than two classes.
    """
    if name not in MODELS:
        raise ValueError(f'model {name!r} is not one of {", ".join(MODELS)}')
    if options['num_classes'] < 2:
        raise ValueError(
            f'num_classes {options["num_classes"]} is below 2: background is a class too, '
            'so a single structure needs num_classes=2'
        )
    known = inspect.signature(MODELS[name]).parameters
    options = {key: value for key, value in options.items() if key in known}
    return MODELS[name](dtype=jnp.dtype(dtype), **options)


__all__ = ['MODELS', 'PSPNet', 'VGGPSPNetBlog', 'create']
