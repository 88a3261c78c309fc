"""Low-grade glioma on brain MRI (Buda et al. 2019): the reference run.

  python -m pspnet_jax.main --config=configs/lgg.py --workdir=runs/lgg
  python -m pspnet_jax.main --config=configs/lgg.py:mobilenet_unet --workdir=runs/unet
  python -m pspnet_jax.main --config=configs/lgg.py:vgg_pspnet --workdir=runs/vgg \\
      --config.data.source=FOLDER --config.model.pretrained=vgg16_imagenet.safetensors

Backbones start from public ImageNet weights (docs/models.md), which are downloaded once; without a
network, the error names the file and where to put it. --config.model.pretrained='' gives random
weights.

| argument         | network                                                       |
|------------------|---------------------------------------------------------------|
| pspnet_resnet50  | the default; also _resnet18, _resnet34, _resnet101, _resnet152 |
| mobilenet_unet   | U-Net on MobileNetV2, with the recipe of zoo:lgg           |
| vgg_pspnet       | dilated VGG16 at output stride 8, full-resolution output      |
| vgg_pspnet_blog  | image-segmentation-keras' geometry: stride 32, quarter output |
| fcn8s, unet, ... | any other model.name, on its own backbone                     |
| NETWORK,strong   | with an augmentation recipe of pspnet_jax/config/augmentations.py |

mobilenet_unet trains for three hours on one CPU core. On the public hold-out of ten patients it has
a mean Dice of 0.896 (median 0.911), and of 0.911 (0.924) with the post-processing that its
validation patients choose; docs/results.md has intervals, devices and commands.
"""

from pspnet_jax.config import augmentations, base


def choose_network(config, arg: str) -> None:
    """Set the network, its initial weights and the augmentation from 'NETWORK,RECIPE'."""
    name, recipe = augmentations.split_recipe(arg)
    config.augment.update(recipe)
    name = name or 'pspnet_resnet50'
    if name.startswith('pspnet_resnet'):
        config.model.name, config.model.backbone = name.split('_')
    else:
        config.model.name = name
    config.model.pretrained = 'imagenet'


# Knobs that go with a network; an augmentation after the comma replaces theirs.
RECIPES = {
    'mobilenet_unet': {
        'data.lesion_floor': 0.25,
        'train.batch_size': 16,
        'train.steps': 3000,
        'train.validate_every': 500,
        'train.ema_decay': 0.995,
        'optim.learning_rate': 5e-4,
        'optim.new_layer_factor': 3.0,
        'augment.crop': 192,
        **{f'augment.{key}': value for key, value in augmentations.RECIPES['strong'].items()},
    },
}


def get_config(arg: str = ''):
    config = base.get_config()
    config.data.name = 'lgg'
    config.data.normalize = 'volume'  # z-scores (Buda 2019): intensities of MRI have no unit
    config.augment.kept_channel = 1  # FLAIR, which fills the place of missing sequences
    config.update_from_flattened_dict(RECIPES.get(augmentations.split_recipe(arg)[0], {}))
    choose_network(config, arg)
    if config.model.name in ('deeplab_v1', 'deeplab_v2'):
        config.crf.kernel = 'windowed'  # 256 x 256 pixels are too many for all pairs
    return config
