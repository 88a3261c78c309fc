"""Prediction as a pure function of parameters and images."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pspnet_jax.models.layers import resize


def probabilities(variables: dict[str, Any], image_BHWC: jax.Array, *, model: nn.Module):
    """B H W K float32 class probabilities at the image's own size."""
    logits_BhwK = model.apply(variables, image_BHWC, train=False)['logits']
    return jax.nn.softmax(resize(logits_BhwK, image_BHWC.shape[1:3]))


def compile_predict(model: nn.Module) -> Callable[[dict[str, Any], np.ndarray], np.ndarray]:
    """`predict(variables, image_BHWC)`, the batch shared by all local devices.

    Compiled once for each shape of batch; one that the devices do not divide is padded.
    """
    n = jax.local_device_count()
    mesh = jax.make_mesh((n,), ('data',), axis_types=(AxisType.Auto,), devices=jax.local_devices())
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
    compiled = jax.jit(
        functools.partial(probabilities, model=model),
        in_shardings=(whole, split),
        out_shardings=split,
    )

    def predict(variables, image_BHWC):
        count = len(image_BHWC)
        image_BHWC = np.pad(image_BHWC, [(0, -count % n)] + [(0, 0)] * 3)
        return np.asarray(compiled(variables, image_BHWC))[:count]

    return predict
