"""Every key is in pspnet_jax/config/base.py; this file is for configs that import it from here."""
