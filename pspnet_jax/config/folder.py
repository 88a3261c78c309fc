"""Your own images and masks: FOLDER/images and FOLDER/masks, paired by name.

  python -m pspnet_jax.main --config=configs/folder.py --config.data.source=FOLDER
  python -m pspnet_jax.main --config=configs/folder.py:unet --config.data.source=FOLDER \\
      --config.data.group='(.+)_[0-9]+' --config.train.epochs=100

The default is a U-Net on MobileNetV2: a tenth of PSPNet's operations, and the best outlines on LGG
(docs/results.md). The argument names another network and an augmentation recipe, as in
configs/lgg.py: `pspnet_resnet50`, or `unet,strong`. Backbones start from ImageNet weights, or from
random ones with --config.model.pretrained=''. `python -m pspnet_jax.check` with the same flags
prints what is wrong with the data before training.
"""

from ml_collections.config_dict import placeholder

from pspnet_jax.config import augmentations, base, lgg


def get_config(arg: str = ''):
    config = base.get_config()
    config.data.name = 'folder'
    lgg.choose_network(config, arg)
    if not augmentations.split_recipe(arg)[0]:
        config.model.name, config.model.backbone = 'unet', 'mobilenet_v2'
    config.train.batch_size = 8
    # Chosen from the data at the start, printed, and stored with the run (training/start.py).
    config.model.num_classes = placeholder(int)
    config.train.epochs = placeholder(float)
    config.optim.learning_rate = placeholder(float)
    config.optim.new_layer_factor = placeholder(float)
    return config
