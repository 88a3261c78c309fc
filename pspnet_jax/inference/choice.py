"""Post-processing chosen by Dice over the validation patients, and kept with the run.

Mirror image, threshold, smallest and largest component are tried in every combination. A choice is
of one checkpoint and of the views that it was made with: scales, tiles, CRF.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pspnet_jax.config import with_prediction
from pspnet_jax.inference.calibration import is_for
from pspnet_jax.runtime.errors import ConfigError, DataError
from pspnet_jax.runtime.storage import write_json
from pspnet_jax.runtime.text import NOTE, read_json

KEPT = 'postprocessing.json'  # in a run's workdir
OPTIONS = ('flip', 'threshold', 'largest_component', 'min_size')


def describe(facts: Mapping[str, Any], split: str = '') -> str:
    """'flip=True, chosen on 8 validation patients (their Dice ...)', of what `choose` found or
    `settings.with_choice` takes; `split` is that of the figures above.
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
    write_json(Path(workdir) / KEPT, facts)


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
    kept = read_json(path, remedy, NOTE)
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
