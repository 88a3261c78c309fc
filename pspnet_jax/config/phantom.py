"""The embedded default: synthetic heads, no download.

  python -m pspnet_jax.main --config=configs/phantom.py
  python -m pspnet_jax.main --config=configs/phantom.py:fcn8s

Half-width networks from random weights. The default is PSPNet on a ResNet-18; the argument names
another network. A deeper backbone is replaced by ResNet-18, and VGG16 by VGG16 with BatchNorm,
since VGG16 does not train from random weights without it. After a comma the argument may name a
recipe of pspnet_jax/config/augmentations.py: `:,strong`, `:fcn8s,none`.
"""

from pspnet_jax.config import augmentations, base

SHALLOW = ('pspnet', 'fcn', 'deeplab_v2', 'deeplab_v3', 'deeplab_v3plus', 'refinenet')
COARSE = ('fcn32s', 'fcn16s', 'vgg_pspnet_blog')  # 4 x 4 cells of 32 pixels are too coarse
VGG = ('fcn32s', 'fcn16s', 'fcn8s', 'dilated', 'deeplab_v1')


def get_config(arg: str = ''):
    config = base.get_config()
    arg, recipe = augmentations.split_recipe(arg)
    config.augment.update(recipe)
    config.model.name = arg or 'pspnet'
    if config.model.name in SHALLOW:
        config.model.backbone = 'resnet18'
    elif config.model.name in VGG:
        config.model.backbone = 'vgg16_bn'
        config.model.fc_features = 256
    if config.model.name in COARSE:
        config.phantom.size = 256  # as large as LGG's slices
    config.model.width = 32
    config.train.batch_size = 8
    config.train.steps = 260
    config.train.validate_every = 130
    config.optim.learning_rate = 1e-3  # nothing is pretrained: one rate for all layers
    config.optim.new_layer_factor = 1.0
    return config
