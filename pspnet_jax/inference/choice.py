"""Post-processing chosen by Dice on the validation cases, and stored with the run.

Mirror image, threshold, min_size and largest_component are tried in every combination. A choice
holds for one checkpoint and for the settings that it was made with: scales, tiles, CRF.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pspnet_jax.config import with_prediction
from pspnet_jax.inference.calibration import read_kept
from pspnet_jax.runtime.storage import write_json

KEPT = 'postprocessing.json'  # in a run's workdir
OPTIONS = ('flip', 'threshold', 'largest_component', 'min_size')


def describe(facts: Mapping[str, Any], split: str = '') -> str:
    """'flip=True, chosen on 8 validation cases (their Dice ...)' from the facts of `choose` or
    `settings.with_choice`; `split` is the split of the metrics that the text goes with.
    """
    dice, without = (
        '-' if facts[key] is None else f'{facts[key]:.3f}' for key in ('dice', 'without')
    )
    options = ', '.join(f'{key}={value}' for key, value in facts['options'].items())
    given = ', '.join(facts.get('given', ()))
    return (
        f'{options}, chosen on {facts["patients"]} validation cases (their Dice {dice}, '
        f'{without} without)'
        + (f'; {given} as given' if given else '')
        + ('; the results are of these cases, so too optimistic' * (split == 'validation'))
    )


def save(workdir: str | Path, facts: dict[str, Any]) -> None:
    """Write WORKDIR/postprocessing.json: 'step', 'views', 'split' and what `choose` found."""
    write_json(Path(workdir) / KEPT, facts)


def load(
    workdir: str | Path, config: Any, step: int, views: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The choice for the checkpoint of `step` and these `views`; None if there is none.

    A choice for another step or other views is logged and not used. Raises DataError for a file
    of another format, or with options that the config can't have.
    """

    def check(kept: dict[str, Any]) -> None:
        if type(kept['patients']) is not int or kept['options'].keys() != set(OPTIONS):
            raise TypeError(f'it has the number of patients and the options {", ".join(OPTIONS)}')
        for dice in (kept['dice'], kept['without']):
            if dice is not None and not (type(dice) in (int, float) and 0 <= dice <= 1):
                raise ValueError('dice is a number from 0 to 1')
        with_prediction(config, kept['options'])

    option = '--choose_postprocessing'
    return read_kept(Path(workdir) / KEPT, 'chosen', option, check, step, views)
