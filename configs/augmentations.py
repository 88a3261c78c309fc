"""Named augmentation: what `config.augment` is set to by a name behind the network's.

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
| strong    | geometric and intensity together                    | aug_all, aug_all2        |

A recipe says all knobs but the crop. Upside-down is for pictures without an upper side.
Your own function is an argument of `train.train_and_evaluate`: README.
"""

NONE = {
    'flip': 0.0,
    'flip_vertical': 0.0,
    'scale': 0.0,
    'rotate': 0.0,
    'elastic': 0.0,
    'gain': 0.0,
    'bias': 0.0,
    'noise': 0.0,
}
GEOMETRIC = {'flip': 0.5, 'flip_vertical': 0.2, 'scale': 0.25, 'rotate': 45.0, 'elastic': 2.0}
INTENSITY = {'gain': 0.25, 'bias': 0.25, 'noise': 0.1}

RECIPES = {
    'none': NONE,
    'flips': {**NONE, 'flip': 0.5, 'flip_vertical': 0.5},
    'geometric': {**NONE, **GEOMETRIC},
    'intensity': {**NONE, **INTENSITY},
    'light': {**NONE, 'flip': 0.5, 'scale': 0.1, 'rotate': 15.0, 'gain': 0.1, 'bias': 0.1},
    'strong': {**NONE, **GEOMETRIC, **INTENSITY},
}


def split_recipe(arg: str) -> tuple[str, dict[str, float]]:
    """'NETWORK,RECIPE' -> the network's name, and the recipe's knobs ({} without one).

    Raises ValueError for a recipe that is not there.
    """
    network, _, name = arg.partition(',')
    if name and name not in RECIPES:
        raise ValueError(f'augmentation {name!r} is not one of {", ".join(RECIPES)}')
    return network, RECIPES[name] if name else {}
