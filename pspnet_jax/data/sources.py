"""Data sources: one function per source, from the config's sections to `Slices`.

A source is imported only when it is used: LGG's needs tensorflow-datasets.
"""

import os
import re
from pathlib import Path
from typing import Any

from pspnet_jax.data import pairing, splits
from pspnet_jax.data.volumes import Slices
from pspnet_jax.runtime.errors import DataError

# Kaggle's names of LGG's slices: CASE_7.tif.
SLICE = re.compile(r'(?P<patient>.+)_(?P<slice>[0-9]{1,9})')
SLICES = r'^(?P<patient>.+?)(?:_(?P<slice>[0-9]{1,9}))?$'


def grouping(config, group: str | None = None) -> str:
    """How files are grouped into patients (see `data.group`): a command's `group`, else the run's.

    For LGG, where each slice of a volume is a file, it is by their names.
    """
    if group is not None:
        return group
    return SLICES if config.data.name == 'lgg' else config.data.group


def read_folder(config, **where: Any) -> Slices:
    """Images and masks as the config reads them; `where` replaces arguments of `folder.load`."""
    from pspnet_jax.data import folder

    data, model = config.data, config.model
    options = {
        'source': data.source,
        'images': data.images,
        'masks': data.masks,
        'group': data.group,
        'classes': {name: n for n, name in enumerate(model.class_names)} or None,
        'attribute': data.attribute,
        'mask_format': data.mask_format,
        'mask_colors': data.mask_colors,
        'mask_name': data.mask_name,
        'label_map': data.to_dict()['label_map'],
        'num_classes': model.num_classes or len(model.class_names) or None,
        'ignore_label': config.loss.ignore_label,
        'threads': data.threads,
    }
    return folder.load(**options | where)


def check_class_names(slices: Slices, config) -> None:
    """Raise DataError if annotations name several classes but the run's config names none: the
    file's class numbers may differ from the run's.
    """
    names, known = slices.class_names, config.model.class_names
    if len(names) > 2 and not known:
        told = ','.join(f'{name}=NUMBER' for name in names[1:])
        raise DataError(
            f'the annotations name the classes {", ".join(names)}, but the run has no names, so '
            'their numbers in training are unknown: write masks with these numbers and evaluate on '
            f'them, python -m pspnet_jax.rasterize --classes={told}'
        )


def elsewhere(config, source: str) -> dict[str, Any]:
    """`folder.load`'s arguments for another folder with the same layout as the run's own data.

    Of an absolute path in the config, the last name is used.
    """

    def named(place: str) -> str:
        folder, rule = pairing.split(Path(place))
        name = folder.name if folder.is_absolute() else folder
        return str(name if rule == pairing.STEM else Path(name, rule))

    images = tuple(map(named, config.data.images))
    return {'source': source, 'images': images, 'masks': named(config.data.masks)}


def places(config) -> list[str]:
    """Absolute paths of the files and folders that `read` reads for this config."""
    data = config.data
    named = {
        'folder': (data.source, *data.images, data.masks) if not data.source else (data.source,),
        'lgg': (data.source, data.root),
    }.get(data.name, ())
    tables = [data.group] if data.name == 'folder' and data.group.endswith('.csv') else []
    return [os.path.abspath(Path(place).expanduser()) for place in (*named, *tables) if place]


def read_phantom(config) -> Slices:
    from pspnet_jax.data import phantom

    return phantom.load(**config.phantom)


def read_lgg(config) -> Slices:
    from pspnet_jax.data import lgg

    return lgg.load(config.data.source, config.data.root)


# {data.name: function that reads it}. Your own entry is a function like these.
SOURCES = {'folder': read_folder, 'phantom': read_phantom, 'lgg': read_lgg}


def read(config) -> Slices:
    """Every slice of the config's data set."""
    return SOURCES[config.data.name](config)


def load(config, split_file: str | Path = '') -> tuple[Slices, dict[str, list[str]]]:
    """(every slice of the config's data set, {split: patients}).

    `split_file`, or else the config's, sets the split if it is given.
    """
    data, slices = config.data, read(config)
    if split_file or data.split_file:
        return slices, splits.read(split_file or data.split_file, slices)
    options = {
        'test_patients': splits.LGG_HOLDOUT if data.name == 'lgg' and data.public_holdout else (),
        'validation_fraction': data.validation_fraction,
        'seed': data.split_seed,
    }
    patients = list(slices.intensity)
    if data.split == 'kfold':
        return slices, splits.kfold(patients, folds=data.folds, fold=data.fold, **options)
    if data.split == 'site':
        return slices, splits.leave_site_out(patients, left_out=data.site, **options)
    return slices, splits.holdout(patients, test_fraction=data.test_fraction, **options)
