"""Recipes are in pspnet_jax/config/augmentations.py; this is for configs that import them here."""

from pspnet_jax.config.augmentations import RECIPES, split_recipe  # noqa: F401
