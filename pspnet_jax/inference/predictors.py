"""Masks for arrays, by one trained network or an ensemble."""

import functools
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.config import with_prediction
from pspnet_jax.data.formats import Picture
from pspnet_jax.data.volumes import check_kind, fit_channels, measure, neighbours, normalize, tile
from pspnet_jax.inference import calibration, infer, postprocess
from pspnet_jax.inference.runs import open_runs, together
from pspnet_jax.inference.settings import label_options, program_options, views, with_choice
from pspnet_jax.runtime import paths
from pspnet_jax.runtime.errors import DataError

logger = logging.getLogger(__name__)
WINDOW_PIXELS = 2**24  # total of the images whose tiles are blended at a time


class Predictor(NamedTuple):
    """A run, or several as an ensemble: predict_fn takes B H W C normalised images.

    `intensity` normalises every image alike; None means that each volume has its own, measured as
    `measured` names it. `temperature` changes the probabilities, not the labels. `chosen` is the
    choice that `settings.with_choice` applied. `runs` lists workdir, step, digest and skipped
    steps of each run.
    """

    config: ConfigDict
    predict_fn: Callable[[np.ndarray], np.ndarray]
    intensity: np.ndarray | None
    channels: int  # of an image, see `runs.Run`
    temperature: float = 1.0
    chosen: Mapping[str, Any] | None = None
    runs: Sequence[Mapping[str, Any]] = ()
    measured: str = 'volume'


class Case(NamedTuple):
    """Slices D H W C that share their size and intensity scale and come from one or more files.

    `pictures` are the files as read, in the order of the slices. `stems` are the paths of their
    results without endings. `around` lists for each slice the slices that the network sees with it,
    H W C each; by default these are its neighbours in the image.
    """

    image: np.ndarray
    intensity: np.ndarray
    pictures: Sequence[Picture] = ()
    stems: Sequence[Path] = ()
    around: Sequence[Sequence[np.ndarray]] = ()


def load(
    workdirs: Sequence[str | Path] | str | Path,
    which: str = '',
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Predictor:
    """Load one run, or several as an ensemble that averages their probabilities.

    `changes` are applied to the first run's config (see `with_prediction`). A single run also uses
    the post-processing that was chosen on validation (`settings.with_choice`). Raises
    CheckpointError for runs of different networks or differently normalised images.
    """
    workdirs = [workdirs] if isinstance(workdirs, str | Path) else list(workdirs)
    runs = open_runs(workdirs, which)
    run, place = together(runs), paths.local(workdirs[0])
    config, chosen, temperature = with_prediction(run.config, changes), None, 1.0
    if run.members == 1:
        config, chosen = with_choice(run.config, place, run.step, changes)
        temperature = calibration.load(place, run.step, views(config))
    options = program_options(config)
    program = infer.compile_predict(run.model, ensemble=run.members > 1, **options)
    predict_fn = functools.partial(program, jax.device_put(run.variables))
    about = [
        {
            'workdir': os.path.abspath(paths.local(workdir)),
            'step': run.step,
            'passed_over': {str(step): reason for step, reason in run.passed_over.items()},
            'digest': run.digest,
        }
        for workdir, run in zip(workdirs, runs, strict=True)
    ]
    return Predictor(
        config, predict_fn, run.intensity, run.channels, temperature, chosen, about,
        run.measured,
    )  # fmt: skip


def predict_array(predictor: Predictor, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels uint8, probabilities K float32) of an image H W, H W C or D H W C.

    D slices are one volume. Raises DataError if the network takes other channels.
    """
    image_DHWC = {2: image[None, ..., None], 3: image[None], 4: image}.get(image.ndim)
    if image_DHWC is None or not image.size:
        raise DataError(
            f'an array of shape {image.shape} is not an image: give H W, H W C or D H W C'
        )
    image_DHWC = as_taken(predictor, image_DHWC, f'an array of shape {image.shape}')
    ((labels, prob),) = segment(predictor, [case_of(predictor, image_DHWC)], probabilities=True)
    return (labels, prob) if image.ndim == 4 else (labels[0], prob[0])


def segment(
    predictor: Predictor, cases: Sequence[Case], *, probabilities: bool
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(labels D H W uint8, probabilities D H W K or None) of each case.

    Slices of one size are predicted together, even from different cases.
    """
    config = predictor.config
    batch_size, options = config.eval.batch_size, label_options(config)
    threshold = options.pop('threshold')
    labels = [np.empty(case.image.shape[:3], np.uint8) for case in cases]
    shapes = [(*case.image.shape[:3], config.model.num_classes) for case in cases]
    probs = [np.empty(shape, np.float32) if probabilities else None for shape in shapes]
    context = config.data.context
    around = [case.around or slices_around(case.image, context) for case in cases]
    scales = [tile(case.intensity, context) for case in cases]
    by_size = defaultdict(list)
    for c, case in enumerate(cases):
        by_size[case.image.shape[1:]] += [(c, d) for d in range(len(case.image))]
    for (H, W, _), places in by_size.items():
        together = batch_size
        if config.predict.window:  # the batch is of tiles, and blending needs memory
            together = min(batch_size, max(WINDOW_PIXELS // (H * W), 1))
        for first in range(0, len(places), together):
            batch = places[first : first + together]
            images = [np.concatenate(around[c][d], axis=-1) for c, d in batch]
            images = np.stack(
                [normalize(x, scales[c]) for x, (c, _) in zip(images, batch, strict=True)]
            )
            if not config.predict.window:
                images = infer.pad_batch(images, batch_size)
            prob_BHWK = predictor.predict_fn(images)
            labels_BHW = postprocess.to_labels(prob_BHWK, threshold)
            for (c, d), labels_HW, prob_HWK in zip(batch, labels_BHW, prob_BHWK, strict=False):
                labels[c][d] = labels_HW
                if probabilities:
                    probs[c][d] = calibration.temper(prob_HWK, predictor.temperature)
    return [
        (postprocess.clean(labels_DHW, **options), prob)
        for labels_DHW, prob in zip(labels, probs, strict=True)
    ]


def slices_around(images: Sequence[np.ndarray], context: int) -> list[list[np.ndarray]]:
    """For each slice of a scan, the slices that the network sees with it."""
    return [[images[row] for row in rows] for rows in neighbours(None, len(images), context)]


def as_taken(predictor: Predictor, image_DHWC: np.ndarray, name: Any) -> np.ndarray:
    """The image with the network's channels. Raises DataError if it can't take the image."""
    if predictor.intensity is not None:
        check_kind(image_DHWC, predictor.intensity, name)
    return fit_channels(image_DHWC, predictor.channels, name)


def case_of(
    predictor: Predictor, image_DHWC: np.ndarray, context: Sequence[np.ndarray] = (), **names
) -> Case:
    """A case; its intensity scale is the network's, or else measured on `context` or the image."""
    if predictor.intensity is not None:
        return Case(image_DHWC, predictor.intensity, **names)
    return Case(image_DHWC, measure(context or [image_DHWC], predictor.measured), **names)
