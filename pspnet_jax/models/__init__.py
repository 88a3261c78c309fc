"""Segmentation networks by name."""

import inspect
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from pspnet_jax.models import backbones
from pspnet_jax.models.deeplab import DeepLabV1, DeepLabV2, DeepLabV3, DeepLabV3Plus
from pspnet_jax.models.dilated import DilatedNet
from pspnet_jax.models.fcn import FCN, DilatedFCN
from pspnet_jax.models.pspnet import PSPNet, VGGPSPNetBlog
from pspnet_jax.models.refinenet import RefineNet
from pspnet_jax.models.segnet import SegNet
from pspnet_jax.models.unet import BackboneUNet, UNet

# {name: (module, default backbone, defaults)}. A default replaces the config's None; defaults that
# are not keys of the config belong to the name. Your own entry looks like these; so does one of
# `backbones.BACKBONES`.
MODELS: dict[str, tuple[type[nn.Module], str | None, dict[str, Any]]] = {
    'fcn32s': (FCN, 'vgg16', {'stride': 32, 'output_stride': 32}),
    'fcn16s': (FCN, 'vgg16', {'stride': 16, 'output_stride': 32}),
    'fcn8s': (FCN, 'vgg16', {'stride': 8, 'output_stride': 32}),
    'fcn': (DilatedFCN, 'resnet50', {'output_stride': 8, 'dilate_first_block': False}),
    'unet': (UNet, None, {}),
    'unet_mini': (UNet, None, {'levels': (0.5, 1, 2)}),
    'segnet': (SegNet, 'vgg16_bn', {'output_stride': 32}),
    'dilated': (DilatedNet, 'vgg16', {'output_stride': 8}),
    'deeplab_v1': (DeepLabV1, 'vgg16', {'output_stride': 8, 'pool': 3}),
    'deeplab_v2': (DeepLabV2, 'resnet101', {'output_stride': 8, 'pool': 3}),
    'refinenet': (RefineNet, 'resnet101', {'output_stride': 32}),
    'pspnet': (PSPNet, 'resnet50', {'output_stride': 8}),
    'deeplab_v3': (DeepLabV3, 'resnet50', {'output_stride': 16, 'multi_grid': (1, 2, 4)}),
    'deeplab_v3plus': (DeepLabV3Plus, 'resnet50', {'output_stride': 16}),
    'vgg_pspnet_blog': (VGGPSPNetBlog, 'vgg16', {'output_stride': 32}),
}
# What VGG16 adds besides its convolutions.
ON_VGG: dict[str, dict[str, Any]] = {
    **{name: {'fc_features': 4096} for name in ('fcn32s', 'fcn16s', 'fcn8s', 'dilated')},
    'deeplab_v2': {'fc_features': 1024},
    'unet': {'center': True},
}
# Their decoders undo five halvings, so only output stride 32 fits.
FIXED_STRIDE = ('fcn32s', 'fcn16s', 'fcn8s', 'segnet', 'vgg_pspnet_blog')
VARIANTS = {'torchvision': ('deeplab_v3',), 'smp': ('deeplab_v3', 'deeplab_v3plus')}

# {image-segmentation-keras' name: ours}; docs/models.md lists the differences.
ALIASES: dict[str, dict[str, Any]] = {
    'fcn_8': {'name': 'fcn8s', 'backbone': 'vgg16_bn', 'fc_features': 1024},
    'fcn_32': {'name': 'fcn32s', 'backbone': 'vgg16_bn', 'fc_features': 1024},
    'fcn_8_vgg': {'name': 'fcn8s', 'backbone': 'vgg16'},
    'fcn_32_vgg': {'name': 'fcn32s', 'backbone': 'vgg16'},
    'fcn_8_resnet50': {'name': 'fcn8s', 'backbone': 'resnet50'},
    'fcn_32_resnet50': {'name': 'fcn32s', 'backbone': 'resnet50'},
    'fcn_8_mobilenet': {'name': 'fcn8s', 'backbone': 'mobilenet_v2'},
    'fcn_32_mobilenet': {'name': 'fcn32s', 'backbone': 'mobilenet_v2'},
    'pspnet': {},
    'vgg_pspnet': {'name': 'pspnet', 'backbone': 'vgg16'},
    'resnet50_pspnet': {'name': 'pspnet', 'backbone': 'resnet50'},
    'pspnet_50': {'name': 'pspnet', 'backbone': 'resnet50', 'deep_stem': True},
    'pspnet_101': {'name': 'pspnet', 'backbone': 'resnet101', 'deep_stem': True},
    'unet_mini': {},
    'unet': {},
    'vgg_unet': {'name': 'unet', 'backbone': 'vgg16'},
    'resnet50_unet': {'name': 'unet', 'backbone': 'resnet50'},
    'mobilenet_unet': {'name': 'unet', 'backbone': 'mobilenet_v2'},
    'segnet': {},
    'vgg_segnet': {'name': 'segnet', 'backbone': 'vgg16'},
    'resnet50_segnet': {'name': 'segnet', 'backbone': 'resnet50'},
    'mobilenet_segnet': {'name': 'segnet', 'backbone': 'mobilenet_v2'},
}


def names() -> tuple[str, ...]:
    """All names for `create`, including entries that were added to MODELS and ALIASES."""
    return tuple(dict.fromkeys((*MODELS, *ALIASES)))


def resolve(
    name: str, *, backbone: str | None = None, **options
) -> tuple[type[nn.Module], str | None, dict[str, Any]]:
    """(module, backbone, options) for a name and the config's values.

    Options that are None take the name's default, else the module's. Raises ValueError for an
    unknown name, and for a value that contradicts the name.
    """
    if name not in names():
        raise ValueError(f'model {name!r} is not one of {", ".join(names())}')
    alias = dict(ALIASES.get(name, {}))
    options = {key: value for key, value in options.items() if value is not None}
    if backbone is not None and backbone != alias.get('backbone', backbone):
        raise ValueError(
            f'{name} uses {alias["backbone"]}, not {backbone}: leave model.backbone as None, or '
            f'use model.name={alias["name"]}'
        )
    name, backbone = alias.pop('name', name), alias.pop('backbone', backbone)
    make, own_backbone, defaults = MODELS[name]
    if name == 'unet' and backbone is not None:
        make, defaults = BackboneUNet, {'output_stride': 32}
    elif own_backbone is None and backbone is not None:
        raise ValueError(f'{name} has its own encoder and takes no {backbone}: use unet')
    if name == 'vgg_pspnet_blog' and backbone not in (None, 'vgg16'):
        raise ValueError(f'vgg_pspnet_blog uses vgg16, not {backbone}: use pspnet')
    if name in FIXED_STRIDE and options.get('output_stride', 32) != 32:
        raise ValueError(
            f'{name} has output stride 32, not {options["output_stride"]}: leave it as None'
        )
    variant = options.get('variant', 'paper')
    if name not in VARIANTS.get(variant, (name,)):
        raise ValueError(
            f'variant {variant!r} is for {" and ".join(VARIANTS[variant])}, not for {name}: '
            "use 'paper'"
        )
    if options.get('deep_supervision') and make not in (UNet, BackboneUNet):
        raise ValueError(
            f'deep_supervision is for U-Nets, not for {name}: leave it as False, or use unet'
        )
    backbone = backbone or own_backbone
    if backbone is not None and backbone.startswith('vgg'):
        defaults = defaults | ON_VGG.get(name, {})
    return make, backbone, {**defaults, **alias, **options}


def create(name: str, *, num_classes: int, dtype: str = 'float32', **options) -> nn.Module:
    """The network `name` as a Flax module: B H W C float -> {'logits': B H W K, ...}.

    `options` are plain values (the config's `model` section); those that the network does not have
    are ignored, so that one section serves every network. Parameters, BatchNorm statistics and
    logits are float32 for any `dtype`.
    Raises ValueError for an unknown name or value, or fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(
            f'num_classes {num_classes} is below 2: background is a class too, '
            'so a single structure needs num_classes=2'
        )
    make, backbone, options = resolve(name, **options)
    options |= {'num_classes': num_classes, 'dtype': jnp.dtype(dtype)}
    if backbone is not None:
        options['backbone'] = backbones.create(backbone, **options)
    known = inspect.signature(make).parameters
    return make(**{key: value for key, value in options.items() if key in known})


def over_axis(model: nn.Module, axis_name: str) -> nn.Module:
    """The same network with BatchNorm and dropout over the batch of a mapped axis."""
    changes = {'axis_name': axis_name} if hasattr(model, 'axis_name') else {}
    if hasattr(model, 'backbone'):
        changes['backbone'] = over_axis(model.backbone, axis_name)
    return model.clone(**changes)
