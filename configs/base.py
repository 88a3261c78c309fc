"""The home of every knob is pspnet_jax/config/base.py; this is for configs that import it here."""

from pspnet_jax.config.base import get_config  # noqa: F401
