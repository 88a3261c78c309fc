"""Predicts videos, frame by frame."""

import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from pspnet_jax.data.formats import video
from pspnet_jax.inference.predictors import Case, Predictor, as_taken, case_of, segment
from pspnet_jax.prediction.results import USUAL, draw, result_names
from pspnet_jax.runtime.errors import DataError, one_line
from pspnet_jax.runtime.threads import in_threads, prefetched

logger = logging.getLogger(__name__)
MOST_FRAMES = 64  # frames on which a video's intensity scale is measured
FRAME_PIXELS = 2**14  # pixels of each of them
EXACT = ('mask', 'probability')  # results that need lossless encoding


class Speed(NamedTuple):
    """Frames done, frames per second of the input, and frames per second of the prediction.

    The first batch does not count, since it includes compilation; NaN if there is no other.
    """

    name: str
    frames: int
    rate: float
    reached: float

    def __str__(self) -> str:
        reached = '' if math.isnan(self.reached) else f', {self.reached:.4g} per second reached'
        name = one_line(self.name)
        return f'{name}: {self.frames} frames at {self.rate:.4g} per second{reached}'


class Spread:
    """At most MOST_FRAMES frames, subsampled and evenly spread over the `count` that were added."""

    def __init__(self):
        self.frames, self.count, self._every = [], 0, 1

    def add(self, frame_HWC: np.ndarray) -> None:
        if self.count % self._every == 0:
            H, W = frame_HWC.shape[:2]
            step = math.ceil(math.sqrt(H * W / FRAME_PIXELS))
            self.frames.append(frame_HWC[::step, ::step].copy())
        self.count += 1
        if len(self.frames) > MOST_FRAMES:
            self.frames, self._every = self.frames[::2], 2 * self._every

    def intensity(self, predictor: Predictor, name: str) -> np.ndarray:
        """The intensity scale of these frames, in the network's channels."""
        taken = as_taken(predictor, np.stack(self.frames), name)
        return case_of(predictor, taken).intensity


def predict_video(
    predictor: Predictor,
    source: Path | int,
    stem: Path,
    *,
    save: Sequence[str] = USUAL,
    limit: int = 0,
) -> Speed:
    """Write videos with the input's size, frame rate and number of frames, without sound.

    `source` is a file, or the number of a camera that is read for `limit` frames or until Ctrl-C.
    Decoding, the network and encoding run in parallel. If each volume has its own intensity scale,
    a file's is measured over its whole length, and a camera's over the frames so far. With
    `data.context` the network also sees the frames before and after. Raises DataError.
    """
    name = f'camera {source}' if isinstance(source, int) else str(source)
    config, frames, first, start = predictor.config, 0, 0, math.nan
    classes, context = config.model.num_classes, config.data.context
    results = [(kind, *item) for kind in save for item in result_names(kind, classes).items()]
    intensity = predictor.intensity
    if intensity is None and not isinstance(source, int):
        intensity = _measure_file(predictor, source, name)

    def timed(batches: Iterable[list]) -> Iterator[list]:
        nonlocal first, start
        for batch in batches:
            if not first:
                first, start = len(batch), time.perf_counter()
            yield batch

    def encode(batch: list) -> int:
        nonlocal frames
        for frame_HWC, labelled in batch:
            for kind, label, result in results:
                writers[result](_pixels(kind, label, frame_HWC, *labelled, config.model))
            frames += 1
        return len(batch)

    with contextlib.ExitStack() as stack:
        rate, count, pictures = stack.enter_context(video.reading(source))
        pictures = itertools.islice(pictures, limit or None)
        writers = {
            result: stack.enter_context(_writing(stem, result, rate, exact=kind in EXACT))
            for kind, _, result in results
        }
        bar = stack.enter_context(tqdm(total=limit or count or None, unit='frame', disable=None))
        # Closed before the file from which it reads.
        batches = _batched(_windows(pictures, context), config.eval.batch_size)
        batches = stack.enter_context(contextlib.closing(prefetched(batches)))
        probabilities = 'probability' in save
        predicted = _predict_batches(predictor, batches, intensity, name, probabilities)
        try:
            for done in in_threads(encode, timed(predicted), 1):
                bar.update(done)
        except KeyboardInterrupt:
            if not isinstance(source, int) or not frames:
                raise
            logger.info('%s: stopped after %d frames', name, frames)
        if not frames:
            raise DataError(f'{name} has no frame that can be read: record or export it again')
        seconds = time.perf_counter() - start
    reached = (frames - first) / seconds if frames > first else math.nan
    return Speed(name, frames, float(rate), reached)


def _measure_file(predictor: Predictor, source: Path, name: str) -> np.ndarray | None:
    """The intensity scale of a file, measured over its whole length; None without frames."""
    seen = Spread()
    with video.reading(source) as (_, _, pictures):
        for frame in pictures:
            seen.add(frame)
    if not seen.frames:
        return None
    logger.info(
        '%s: one intensity scale, measured over %d of its %d frames',
        name, len(seen.frames), seen.count,
    )  # fmt: skip
    return seen.intensity(predictor, name)


def _predict_batches(
    predictor: Predictor, batches: Iterable[list[list[np.ndarray]]],
    intensity: np.ndarray | None, name: str, probabilities: bool,
) -> Iterator[list]:  # fmt: skip
    """[(frame H W C, `segment`'s labels and probabilities)] of each batch of `_windows`.

    Without `intensity` the scale is measured over the frames so far.
    """
    running, seen, context = intensity is None, Spread(), predictor.config.data.context
    for windows in batches:
        frames = [window[context] for window in windows]
        if running and not seen.count:
            logger.info(
                '%s: the intensity scale is measured on the frames so far, so the first masks are '
                'less reliable', name,
            )  # fmt: skip
        if running:
            for frame in frames:
                seen.add(frame)
            intensity = seen.intensity(predictor, name)
        cases = []
        for window in windows:
            around = [as_taken(predictor, frame[None], name)[0] for frame in window]
            cases.append(Case(around[context][None], intensity, around=[around]))
        labelled = segment(predictor, cases, probabilities=probabilities)
        yield list(zip(frames, labelled, strict=True))


def _pixels(
    kind: str, label: int, frame_HWC: np.ndarray, labels_1HW: np.ndarray,
    prob_1HWK: np.ndarray | None, model: ConfigDict,
) -> np.ndarray:  # fmt: skip
    """One frame of a kind of result; `model` is the config's section."""
    if kind == 'mask':
        return labels_1HW[0] * np.uint8(255 if model.num_classes == 2 else 1)
    if kind == 'probability':
        return np.rint(255 * prob_1HWK[0, ..., label]).astype(np.uint8)
    return draw(kind, frame_HWC, labels_1HW[0], model.class_names)


def _writing(stem: Path, result: str, rate: Any, exact: bool):
    """`video.writing` to STEM_RESULT.mp4, or to .mkv if `exact`."""
    path = stem.with_name(f'{stem.name}_{result}{".mkv" if exact else ".mp4"}')
    return video.writing(path, rate, exact=exact)


def _windows(frames: Iterable[np.ndarray], context: int) -> Iterator[list[np.ndarray]]:
    """Each frame with `context` frames on either side; the first and last frame are repeated.

    The streaming form of `volumes.neighbours`.
    """
    seen = deque(maxlen=2 * context + 1)
    for frame in frames:
        seen.extend([frame] * (1 if seen else context + 1))
        if len(seen) == seen.maxlen:
            yield list(seen)
    for _ in range(context if seen else 0):
        seen.append(seen[-1])
        if len(seen) == seen.maxlen:
            yield list(seen)


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
