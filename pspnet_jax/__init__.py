"""PSPNet and related networks for medical image segmentation, in JAX and Flax.

Dimension letters in names that contain a shape (logits_BHWK, labels_BHW):

  B batch        H W pixels     h w feature cells   C channels
  K classes      D slices       N slices or patients of a list

Folders import downwards only; tests/test_layering.py checks it:

  main, check, evaluate, predict, export, convert: the commands, on cli; api: train, load, Model
  training, prediction, serving
  evaluation
  inference
  config
  models, data
  runtime

No file imports configs, experiments or tests.
"""

import logging
import sys

from pspnet_jax.api import Model, load, train
from pspnet_jax.runtime import VERSION

__all__ = ['Model', 'load', 'train']
__version__ = VERSION

if 'ipykernel' in sys.modules:  # in a notebook, where Python prints only warnings
    _logger = logging.getLogger(__name__)
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
        _handler = logging.StreamHandler(sys.stdout)
        _handler.addFilter(lambda record: not logging.getLogger().handlers)  # avoid printing twice
        _logger.addHandler(_handler)
