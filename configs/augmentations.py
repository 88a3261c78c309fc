"""For configs that import the recipes of pspnet_jax/config/augmentations.py from here."""
