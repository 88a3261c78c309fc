"""Your own images and masks: FOLDER/images and FOLDER/masks, paired by name.

  python -m pspnet_jax.main --config=configs/folder.py --config.data.source=FOLDER
  python -m pspnet_jax.main --config=configs/folder.py:unet --config.data.source=FOLDER \\
      --config.data.group='(.+)_[0-9]+' --config.train.epochs=100

The argument is a network's name and an augmentation recipe, as in configs/lgg.py. Backbones start
from ImageNet weights, or from random ones with --config.model.pretrained=''. `python -m
pspnet_jax.check` with the same flags prints what is wrong with the data before training.
"""

from ml_collections.config_dict import placeholder

from pspnet_jax.config import base, lgg


def get_config(arg: str = ''):
    config = base.get_config()
    config.data.name = 'folder'
    lgg.choose_network(config, arg)
    config.train.batch_size = 8
    # Chosen from the data at the start, printed, and stored with the run (training/start.py).
    config.model.num_classes = placeholder(int)
    config.train.epochs = placeholder(float)
    config.optim.learning_rate = placeholder(float)
    config.optim.new_layer_factor = placeholder(float)
    return config
