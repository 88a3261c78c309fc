"""PSPNet and its kin for medical image segmentation, in JAX and Flax.

Dimension letters, wherever a name carries its shape (logits_BHWK, labels_BHW):

  B batch        H W pixels     h w feature cells   C channels
  K classes      D slices       N slices or patients of a list

Imports point downwards, held by tests/test_layering.py:

  main -> train -> evaluate -> infer -> crf, metrics, calibration
                -> report -> chart, log, visualize
                -> models, optim, losses, checkpoint, log, visualize
                -> data.sources -> data.lgg, data.phantom -> data.volumes

Nothing imports configs, experiments or tests.
"""
