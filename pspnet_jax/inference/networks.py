"""The shapes of a network's parameters, without computing them."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspnet_jax.runtime.errors import ConfigError, first_line


def abstract_variables(model: nn.Module, channels: int) -> dict[str, Any]:
    """Shapes and dtypes of a network's variables. Raises ConfigError if it can't be built."""
    image = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    init = functools.partial(model.init, train=False)
    try:
        return jax.eval_shape(init, jax.random.key(0), image)
    except Exception as error:  # each layer raises its own, and the config may be untrusted
        reason = first_line(error)
        raise ConfigError(f'the model section describes no network: {reason}') from error
