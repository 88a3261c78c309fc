"""Post-processing chosen by Dice over the validation patients, and kept with the run.

Mirror image, threshold, smallest and largest component are tried in every combination. A choice is
of one checkpoint and of the views that it was made with: scales, tiles, CRF.
"""

import itertools
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pspnet_jax import metrics, postprocess
from pspnet_jax.calibration import is_for
from pspnet_jax.config import with_prediction
from pspnet_jax.data.files import writing
from pspnet_jax.errors import ConfigError, DataError
from pspnet_jax.text import read_json

KEPT = 'postprocessing.json'  # in a run's workdir
OPTIONS = ('flip', 'threshold', 'largest_component', 'min_size')
THRESHOLDS = tuple(n / 20 for n in range(2, 19))  # 0.1 to 0.9, of two classes
MIN_SIZES = (0, 10, 30, 100, 300, 1000)  # voxels
TIE = 1e-9  # of Dice


def grid(own: Mapping[str, Any], num_classes: int, given: Collection[str]) -> dict[str, list[Any]]:
    """{option: values to try}, the first of each is `own`; those that were `given` have no other.

    More than two classes have no threshold: the likeliest is taken.
    """
    values = {
        'flip': (False, True),
        'threshold': THRESHOLDS if num_classes == 2 else (),
        'largest_component': (False, True),
        'min_size': MIN_SIZES,
    }
    return {
        key: list(dict.fromkeys([own[key], *(() if key in given else values[key])]))
        for key in OPTIONS
    }


def tally(
    labels_DHW: np.ndarray,
    mask_DHW: np.ndarray,
    *,
    scans: Sequence[np.ndarray],
    structures: Sequence[int],
    ignore_label: int,
    largest: Sequence[bool],
    min_sizes: Sequence[int],
) -> np.ndarray:
    """(largest, min_sizes, structures, 3) int64: `metrics.counts` of what `postprocess.clean`
    leaves of each scan, for each of `largest` with each of `min_sizes`.

    Components are labelled once: what they hold adds up, and cleaning one class changes no other.
    """
    counts = np.zeros((len(largest), len(min_sizes), len(structures), 3), np.int64)
    counted = mask_DHW != ignore_label
    for s, label in enumerate(structures):
        theirs = mask_DHW == label
        for rows in scans:
            if not (found := metrics.label_components(labels_DHW[rows] == label)):
                continue
            box, parts, sizes = found
            hits, seen = (
                np.bincount(parts[where[rows][box]], minlength=len(sizes) + 1)[1:]
                for where in (theirs, counted)
            )
            for i, one in enumerate(largest):
                for j, size in enumerate(min_sizes):
                    kept = postprocess.keep(sizes, largest_component=one, min_size=size)
                    counts[i, j, s, :2] += hits[kept].sum(), (seen - hits)[kept].sum()
        counts[..., s, 2] = np.count_nonzero(theirs) - counts[..., s, 0]
    return counts


def mean_dice(counts: np.ndarray) -> np.ndarray:
    """(..., structures, 3) -> (...): the mean over structures, NaN where all are undefined."""
    return _mean(metrics.ratios(counts)['dice'], axis=-1)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    with np.errstate(invalid='ignore'):
        return np.nansum(values, axis) / np.count_nonzero(~np.isnan(values), axis)


def combinations(tried: Mapping[str, Sequence[Any]], dice_PN: np.ndarray) -> list[dict[str, Any]]:
    """A row a combination, in the order of `itertools.product`: its options, 'dice', the mean over
    those of P patients where it is defined, None where it is of none, and 'n', how many these are.
    """
    return [
        {
            **dict(zip(tried, values, strict=True)),
            'dice': None if np.isnan(dice) else float(dice),
            'n': int(n),
        }
        for values, dice, n in zip(
            itertools.product(*tried.values()),
            _mean(dice_PN, axis=0),
            np.count_nonzero(~np.isnan(dice_PN), axis=0),
            strict=True,
        )
    ]


def best(rows: Sequence[dict[str, Any]], tried: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The row of the highest Dice; of several within `TIE` that which changes the fewest options.

    Raises DataError where no Dice is defined.
    """
    defined = [row for row in rows if row['dice'] is not None]
    if not defined:
        raise DataError(
            'no validation patient has a structure, so there is no Dice to choose '
            'post-processing by: raise data.validation_fraction, and train again'
        )
    highest = max(row['dice'] for row in defined)
    return min(
        (row for row in defined if row['dice'] >= highest - TIE),
        key=lambda row: sum(row[key] != values[0] for key, values in tried.items()),
    )


def choose(tried: Mapping[str, Sequence[Any]], dice_PN: np.ndarray) -> dict[str, Any]:
    """What `save` keeps of Dice of P patients and N combinations: 'options', their 'dice' and that
    'without', over how many 'patients', and under 'best' the best row of each value tried.
    """
    rows = combinations(tried, dice_PN)
    found = best(rows, tried)
    several = [(key, value) for key, values in tried.items() if values[1:] for value in values]
    return {
        'options': {key: found[key] for key in tried},
        'dice': found['dice'],
        'without': rows[0]['dice'],
        'patients': len(dice_PN),
        'n': found['n'],
        'best': [
            {'of': key, **best(some, tried)}
            for key, value in several
            for some in [[row for row in rows if row[key] == value]]
            if any(row['dice'] is not None for row in some)
        ],
    }


def words(facts: Mapping[str, Any], split: str = '') -> str:
    """'flip=True, chosen on 8 validation patients (their Dice ...)', of what `choose` found or
    `evaluate.with_choice` takes; `split` is that of the figures above.
    """
    dice, without = (
        '-' if facts[key] is None else f'{facts[key]:.3f}' for key in ('dice', 'without')
    )
    options = ', '.join(f'{key}={value}' for key, value in facts['options'].items())
    given = ', '.join(facts.get('given', ()))
    return (
        f'{options}, chosen on {facts["patients"]} validation patients (their Dice {dice}, '
        f'{without} without)'
        + (f'; {given} as given' if given else '')
        + ('; the figures are of these patients, so they are too good' * (split == 'validation'))
    )


def save(workdir: str | Path, facts: dict[str, Any]) -> None:
    """Write WORKDIR/postprocessing.json: 'step', 'views', 'split' and what `choose` found."""
    with writing(Path(workdir) / KEPT) as aside:
        aside.write_text(json.dumps(facts, indent=1, allow_nan=False) + '\n')


def load(
    workdir: str | Path, config: Any, step: int, views: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What was chosen for the checkpoint of `step`, seen as `views` says; None where nothing was,
    which the log says if there is another choice.

    Raises DataError for a file that is not ours, or of options that the config can't have.
    """
    path = Path(workdir) / KEPT
    if not os.path.lexists(path):
        return None
    again = (
        f'python -m pspnet_jax.evaluate --workdir={workdir} --split=validation '
        '--choose_postprocessing'
    )
    remedy = f'delete it, or choose again by {again}'
    kept = read_json(path, remedy)
    try:
        chosen_for, seen, options = kept['step'], kept['views'], kept['options']
        if type(chosen_for) is not int or type(kept['patients']) is not int:
            raise TypeError('step and patients are whole numbers')
        if not isinstance(seen, dict) or options.keys() != set(OPTIONS):
            raise TypeError(f'its options are {", ".join(OPTIONS)}')
        for dice in (kept['dice'], kept['without']):
            if dice is not None and not (type(dice) in (int, float) and 0 <= dice <= 1):
                raise ValueError('dice is a number from 0 to 1')
        with_prediction(config, options)
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f'{path} holds no choice of post-processing ({str(error)[:300]}): {remedy}'
        ) from error
    return kept if is_for(path, chosen_for, seen, step, views, 'chosen', again) else None
