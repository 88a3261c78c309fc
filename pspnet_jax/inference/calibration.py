"""Temperature scaling: one temperature, fitted on validation cases and stored with the run.

It holds for one checkpoint and its prediction settings: scales, mirror images, tiles, CRF. The
most probable class never changes, so labels, Dice and distances do not change either.

Guo et al. 2017 (arXiv:1706.04599, section 4.2).
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy import optimize, special

from pspnet_jax.runtime.errors import DataError
from pspnet_jax.runtime.storage import write_json
from pspnet_jax.runtime.text import NOTE, read_json

logger = logging.getLogger(__name__)

KEPT = 'temperature.json'  # in a run's workdir
BOUNDS = (0.05, 20.0)
TINY = np.finfo(np.float32).tiny  # replaces probabilities that underflow to 0 in float32


def temper(prob: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / T) over the last axis.

    For p = softmax(logits) that is softmax(logits / T): log p differs from the logits by a
    constant per pixel. It also works after a CRF, which has no logits.
    """
    if temperature == 1.0:
        return prob
    return special.softmax(np.log(np.maximum(prob, TINY)) / np.float32(temperature), axis=-1)


def sample(
    prob: np.ndarray, labels: np.ndarray, ignore_label: int, count: int, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(n, K) probabilities and n labels of at most `count` pixels, the same for the same seed.

    `prob` is ... K, `labels` ...; every pixel that is not ignored has the same chance.
    """
    counted = np.flatnonzero(labels.ravel() != ignore_label)
    if len(counted) > count:
        counted = np.random.default_rng(seed).choice(counted, count, replace=False)
    return prob.reshape(-1, prob.shape[-1])[counted], labels.ravel()[counted]


def negative_log_likelihood(prob: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Mean over N of -log softmax(log p / T)[label]; prob N K, labels N."""
    log_prob = np.log(np.maximum(prob, TINY)).astype(np.float64) / temperature
    chosen = log_prob[np.arange(len(labels)), labels]
    return float(np.mean(special.logsumexp(log_prob, axis=-1) - chosen))


def fit(prob: np.ndarray, labels: np.ndarray) -> float:
    """The T within `BOUNDS` with the smallest negative log likelihood of labels N, prob N K.

    It is convex in 1/T, so there is one minimum. If every label has the largest probability, the
    lower bound is returned.
    """
    found = optimize.minimize_scalar(
        lambda log_t: negative_log_likelihood(prob, labels, math.exp(log_t)),
        bounds=np.log(BOUNDS),
        method='bounded',
        options={'xatol': 1e-4},
    )
    return math.exp(found.x)


def describe(facts: Mapping[str, Any], step: int) -> str:
    """One line about the result of `evaluation.fitting.fit_temperature`."""
    return (
        f'temperature {facts["temperature"]:.3f} for step {step}: negative log likelihood '
        f'{facts["without"]:.4f} without, {facts["negative_log_likelihood"]:.4f} with'
    )


def save(workdir: str | Path, facts: dict[str, Any]) -> None:
    """Write WORKDIR/temperature.json: 'step', 'views', 'temperature', and how it was fitted."""
    write_json(Path(workdir) / KEPT, facts)


def load(workdir: str | Path, step: int, views: Mapping[str, Any] = MappingProxyType({})) -> float:
    """The temperature fitted for the checkpoint of `step` and these `views`; 1 if there is none.

    One for another step or other views is logged and not used. Raises DataError for a file of
    another format.
    """

    def check(kept: dict[str, Any]) -> None:
        if type(kept['temperature']) not in (int, float):
            raise TypeError('the temperature is not a number')
        if not BOUNDS[0] * 0.99 <= kept['temperature'] <= BOUNDS[1] * 1.01:
            raise ValueError(f'the temperature is {kept["temperature"]}')

    kept = read_kept(Path(workdir) / KEPT, 'fitted', '--fit_temperature', check, step, views)
    return kept['temperature'] if kept else 1.0


def read_kept(
    path: Path,
    done: str,
    option: str,
    check: Callable[[dict[str, Any]], None],
    step: int,
    views: Mapping[str, Any],
) -> dict[str, Any] | None:
    """What the `option` of `evaluate` stored at `path`, if it is for this step and these views.

    Else None, with a line in the log if there is a file; `done` is the verb there ('fitted').
    `check` raises ValueError, TypeError or KeyError for another format, which becomes a DataError.
    """
    if not os.path.lexists(path):
        return None
    again = f'python -m pspnet_jax.evaluate --workdir={path.parent} --split=validation {option}'
    remedy = f'delete it, or make it again with {again}'
    kept = read_json(path, remedy, NOTE)
    try:
        its_step, its_views = kept['step'], kept.get('views', {})
        if type(its_step) is not int or not isinstance(its_views, dict):
            raise TypeError('step must be a whole number, views an object')
        check(kept)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error)[:300]
        raise DataError(f'{path} is not a file of {option} ({reason}): {remedy}') from error
    if its_step != step:
        logger.warning('%s is for step %.20s, this is step %d: not applied', path, its_step, step)
        return None
    differ = sorted(key for key in its_views.keys() | views if its_views.get(key) != views.get(key))
    if differ:
        what = 'has no prediction settings'
        if its_views:
            what = f'was {done} with other prediction settings ({", ".join(differ):.200})'
        logger.warning(
            '%s %s: not applied; to make it again, add the same flags to %s', path, what, again
        )
        return None
    return kept
