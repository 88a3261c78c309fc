"""PSPNet and its kin for medical image segmentation, in JAX and Flax.

Dimension letters, wherever a name carries its shape (logits_BHWK, labels_BHW):

  B batch        H W pixels     h w feature cells   C channels
  K classes      D slices       N slices or patients of a list

Imports point downwards, held by tests/test_layering.py:

  main -> train -> transfer -> evaluate -> infer -> crf
                                        -> report -> chart, log, visualize
                                        -> calibration, metrics, postprocess
                -> models, optim, losses, checkpoint
                -> data.sources -> data.folder, data.lgg, data.phantom
                                -> data.via, data.files -> data.volumes
                -> faults -> hosts
  api, predict, export stand on these, cli on hosts; errors and text stand below all.

No file imports configs, experiments or tests.
"""

import importlib
import logging
import sys

__version__ = '0.1.0'  # as pyproject.toml has it

if 'ipykernel' in sys.modules:  # in a notebook, where Python prints warnings alone
    _logger = logging.getLogger(__name__)
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
        _handler = logging.StreamHandler(sys.stdout)
        _handler.addFilter(lambda record: not logging.getLogger().handlers)  # these print it
        _logger.addHandler(_handler)


def __getattr__(name):
    """`pspnet_jax.load` and `.train` (and `.Model`), imported when they are asked for."""
    if name in ('load', 'Model'):
        from pspnet_jax import api

        return getattr(api, name)
    if name == 'train':
        return importlib.import_module('pspnet_jax.train')  # which can be called
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
