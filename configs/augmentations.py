"""Recipes are in pspnet_jax/config/augmentations.py; this is for configs that import them here."""
