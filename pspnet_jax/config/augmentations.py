"""Named augmentation recipes: a name after the network's name sets `config.augment`.

  python -m pspnet_jax.main --config=configs/lgg.py:vgg_pspnet,strong --workdir=runs/strong
  python -m pspnet_jax.main --config=configs/lgg.py:,geometric --workdir=runs/geometric \\
      --config.augment.rotate=45

| name      | what                                                | image-segmentation-keras |
|-----------|-----------------------------------------------------|--------------------------|
| none      | the slice as it is                                  | do_augment=False         |
| flips     | left-right and upside-down                          |                          |
| geometric | flips, zoom, rotation, elastic deformation          | aug_geometric            |
| intensity | gain and shift of each channel, noise               | aug_non_geometric        |
| light     | the default: left-right, zoom, rotation, intensity  |                          |
| strong    | geometric, intensity, blur, low resolution, gamma   | aug_all, aug_all2        |
| nnunet    | what nnU-Net v2 does to 2-D patches; see below      |                          |

A recipe sets every key of `augment` but `crop` and `kept_channel`. Upside-down flips suit images
without a top.
`nnunet` has the ranges of nnU-Net (Isensee et al. 2021), its mirroring of both axes, and its
probabilities of blur, low resolution and gamma. Zoom, rotation, gain and noise change every image
here, whereas nnU-Net changes 10 to 20 %; noise is therefore a third of nnU-Net's largest.
To use a function of your own, pass augment_fn to `training.loop.train_and_evaluate`.
"""

NONE = {
    'flip': 0.0,
    'flip_vertical': 0.0,
    'scale': 0.0,
    'rotate': 0.0,
    'elastic': 0.0,
    'blur': 0.0,
    'blur_probability': 0.2,
    'low_resolution': 0.0,
    'low_resolution_probability': 0.25,
    'gamma': 0.0,
    'gamma_probability': 0.3,
    'gain': 0.0,
    'bias': 0.0,
    'noise': 0.0,
    'channel_dropout': 0.0,
}
GEOMETRIC = {'flip': 0.5, 'flip_vertical': 0.2, 'scale': 0.25, 'rotate': 45.0, 'elastic': 2.0}
SHARPNESS = {'blur': 1.0, 'low_resolution': 0.5}
GAMMA = {'gamma': 0.5}
INTENSITY = {'gain': 0.25, 'bias': 0.25, 'noise': 0.1}

RECIPES = {
    'none': NONE,
    'flips': {**NONE, 'flip': 0.5, 'flip_vertical': 0.5},
    'geometric': {**NONE, **GEOMETRIC},
    'intensity': {**NONE, **INTENSITY},
    'light': {**NONE, 'flip': 0.5, 'scale': 0.1, 'rotate': 15.0, 'gain': 0.1, 'bias': 0.1},
    'strong': {**NONE, **GEOMETRIC, **INTENSITY, **SHARPNESS, **GAMMA},
    'nnunet': {
        **NONE,
        'flip': 0.5,
        'flip_vertical': 0.5,
        'scale': 0.4,
        'rotate': 180.0,
        'gain': 0.25,
        'noise': 0.1,
        **SHARPNESS,
        **GAMMA,
    },
}


def split_recipe(arg: str) -> tuple[str, dict[str, float]]:
    """'NETWORK,RECIPE' -> the network's name, and the recipe's knobs ({} without one).

    Raises ValueError for an unknown recipe.
    """
    network, _, name = arg.partition(',')
    if name and name not in RECIPES:
        raise ValueError(f'augmentation {name!r} is not one of {", ".join(RECIPES)}')
    return network, RECIPES[name] if name else {}
