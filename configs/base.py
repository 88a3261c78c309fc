"""The home of every knob is pspnet_jax/config/base.py; this is for configs that import it here."""
