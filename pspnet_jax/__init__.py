"""PSPNet and its kin for medical image segmentation, in JAX and Flax."""
