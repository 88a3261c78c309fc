"""Masks and pictures for videos, frame by frame."""

import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pspnet_jax.data.formats import video
from pspnet_jax.inference.predictors import Case, Predictor, as_taken, case_of, segment
from pspnet_jax.prediction.results import USUAL, draw, result_names
from pspnet_jax.runtime.errors import DataError, one_line
from pspnet_jax.runtime.threads import ahead, in_threads

logger = logging.getLogger(__name__)
MOST_FRAMES = 64  # of a video that its intensity scale is measured on
FRAME_PIXELS = 2**14  # of each of them


class Speed(NamedTuple):
    """Frames done, frames a second of the input, and those reached.

    The first batch does not count, as it waits for the compiler; NaN where there is no other.
    """

    name: str
    frames: int
    rate: float
    reached: float

    def __str__(self) -> str:
        reached = '' if math.isnan(self.reached) else f', {self.reached:.4g} a second reached'
        name = one_line(self.name)
        return f'{name}: {self.frames} frames of {self.rate:.4g} a second{reached}'


class Spread:
    """Frames evenly spread over the `count` that were added, at most MOST_FRAMES, made coarse."""

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

    def fitted(self, predictor: Predictor, name: str) -> np.ndarray:
        """D h w C, as the network takes them."""
        return as_taken(predictor, np.stack(self.frames), name)


def predict_video(
    predictor: Predictor,
    source: Path | int,
    stem: Path,
    *,
    save: Sequence[str] = USUAL,
    limit: int = 0,
) -> Speed:
    """Write videos with the input's size, frame rate and number of frames; sound is left out.

    `source` is a file or the number of a camera, which is read to `limit` frames or until
    Ctrl-C. Decoding, the network and encoding run at once. Where each volume has its own
    intensity scale, that of a file is measured over frames from its start to its end, and that of
    a camera again and again over those it has given so far. With `data.context` a frame stands
    between those before and after it. Raises DataError.
    """
    name = f'camera {source}' if isinstance(source, int) else str(source)
    batch_size, classes = predictor.config.eval.batch_size, predictor.config.model.num_classes
    context = predictor.config.data.context  # of frames, as many before and after
    results = [(kind, *item) for kind in save for item in result_names(kind, classes).items()]
    exact = ('mask', 'probability')
    intensity, seen, frames, first, start = predictor.intensity, Spread(), 0, 0, math.nan
    if intensity is None and not isinstance(source, int):
        with video.reading(source) as (_, _, pictures):
            for frame in pictures:
                seen.add(frame)
        if seen.frames:
            intensity = case_of(predictor, seen.fitted(predictor, name)).intensity
            logger.info(
                '%s: one intensity scale, measured over %d of its %d frames',
                name, len(seen.frames), seen.count,
            )  # fmt: skip
    running = intensity is None and isinstance(source, int)
    if running:
        logger.info(
            '%s: its intensity scale is that of the frames so far, so the first masks have a '
            'scale that changes', name,
        )  # fmt: skip

    def predicted(batches: Iterable[list[np.ndarray]]) -> Iterator[list]:
        nonlocal intensity, first, start
        for windows in batches:
            batch = [window[context] for window in windows]
            taken = [
                [as_taken(predictor, frame[None], name)[0] for frame in window]
                for window in windows
            ]
            if running:
                for frame in batch:
                    seen.add(frame)
                intensity = case_of(predictor, seen.fitted(predictor, name)).intensity
            cases = [Case(around[context][None], intensity, around=[around]) for around in taken]
            labelled = segment(predictor, cases, probabilities='probability' in save)
            if not first:
                first, start = len(batch), time.perf_counter()
            yield list(zip(batch, labelled, strict=True))

    def encode(batch: list) -> int:
        nonlocal frames
        for frame_HWC, (labels_1HW, prob_1HWK) in batch:
            for kind, label, result in results:
                if kind == 'mask':
                    pixels = labels_1HW[0] * np.uint8(255 if classes == 2 else 1)
                elif kind == 'probability':
                    pixels = np.rint(255 * prob_1HWK[0, ..., label]).astype(np.uint8)
                else:
                    names = predictor.config.model.class_names
                    pixels = draw(kind, frame_HWC, labels_1HW[0], names)
                writers[result](pixels)
            frames += 1
        return len(batch)

    with contextlib.ExitStack() as stack:
        rate, count, pictures = stack.enter_context(video.reading(source))
        pictures = itertools.islice(pictures, limit or None)
        writers = {
            result: stack.enter_context(
                video.writing(
                    stem.with_name(f'{stem.name}_{result}{".mkv" if kind in exact else ".mp4"}'),
                    rate,
                    exact=kind in exact,
                )
            )
            for kind, _, result in results
        }
        bar = stack.enter_context(tqdm(total=limit or count or None, unit='frame', disable=None))
        # Closed before the file that it reads from is.
        windows = _windows(pictures, context)
        batches = stack.enter_context(contextlib.closing(ahead(_batched(windows, batch_size))))
        try:
            for done in in_threads(encode, predicted(batches), 1):
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


def _windows(frames: Iterable[np.ndarray], context: int) -> Iterator[list[np.ndarray]]:
    """Each frame between as many others on either side, of which the first and last are repeated:
    `volumes.neighbours` of what is not there yet.
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
