"""The embedded default: synthetic heads, no download.

  python -m pspnet_jax.main --config=configs/phantom.py

PSPNet on a half-width ResNet-18 from random weights.
"""

from configs import base


def get_config(arg: str = ''):
    config = base.get_config(arg)
    config.model.backbone = 'resnet18'
    config.model.width = 32
    config.train.batch_size = 8
    config.train.steps = 260
    config.train.validate_every = 130
    config.optim.learning_rate = 1e-3  # nothing is pretrained: one rate for all layers
    config.optim.new_layer_factor = 1.0
    return config
