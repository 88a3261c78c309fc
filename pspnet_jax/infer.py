"""Prediction as a pure function of parameters and images."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pspnet_jax import compilation, crf
from pspnet_jax.errors import ConfigError
from pspnet_jax.models.layers import resize

EXACT_CRF_PIXELS = 128 * 128  # a matrix of 1 GiB


def probabilities(
    variables: dict[str, Any],
    image_BHWC: jax.Array,
    *,
    model: nn.Module,
    kernel: str = 'none',
    window: int = 0,
    **crf_options: Any,
) -> jax.Array:
    """B H W K float32 class probabilities at the image's own size.

    `kernel`, 'exact' or 'windowed', puts a fully connected CRF behind the network, image by
    image; the options are `crf.mean_field`'s. Raises ConfigError for 'exact' on an image
    whose pairs of pixels do not fit the memory.
    """
    H, W = image_BHWC.shape[1:3]
    logits_BhwK = model.apply(variables, image_BHWC, train=False)['logits']
    logits_BHWK = resize(logits_BhwK, (H, W))
    if kernel == 'none':
        return jax.nn.softmax(logits_BHWK)
    if kernel == 'exact' and H * W > EXACT_CRF_PIXELS:
        raise ConfigError(
            f"crf.kernel 'exact' is for up to {EXACT_CRF_PIXELS} pixels, the images have "
            f"{H} x {W}: use 'windowed'"
        )
    refine = functools.partial(
        crf.mean_field, window=None if kernel == 'exact' else window, **crf_options
    )
    return jax.lax.map(lambda pair: refine(*pair), (logits_BHWK, image_BHWC))


def compile_predict(
    model: nn.Module, **crf_options: Any
) -> Callable[[dict[str, Any], np.ndarray], np.ndarray]:
    """`predict(variables, image_BHWC)`: `probabilities`, the batch shared by all local devices.

    Compiled once for each shape of batch; one that the devices do not divide is padded.
    """
    n = jax.local_device_count()
    mesh = jax.make_mesh((n,), ('data',), axis_types=(AxisType.Auto,), devices=jax.local_devices())
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
    compiled = jax.jit(
        functools.partial(probabilities, model=model, **crf_options),
        in_shardings=(whole, split),
        out_shardings=split,
        compiler_options=compilation.options(),
    )

    def predict(variables, image_BHWC):
        count = len(image_BHWC)
        image_BHWC = np.pad(image_BHWC, [(0, -count % n)] + [(0, 0)] * 3)
        return np.asarray(compiled(variables, image_BHWC))[:count]

    return predict
