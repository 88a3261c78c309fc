"""Videos and cameras, by PyAV: RGB frames in, RGB or grey frames out."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pspnet_jax.data.files import writing as aside_then_rename
from pspnet_jax.errors import DataError, first_line

SUFFIXES = ('.mp4', '.mov', '.m4v', '.avi', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv')
PIP = 'pip install "av>=18.1,<19"'
# System -> how FFmpeg calls its cameras, and the camera of a number.
CAMERAS = {
    'linux': ('v4l2', '/dev/video{}'),
    'darwin': ('avfoundation', '{}'),
    'win32': ('vfwcap', '{}'),
}
# What SUFFIXES hold. FFmpeg goes by the content: a list of other files, which may be private ones
# or elsewhere on the net, is a video to it whatever its name.
CONTAINERS = 'mov,matroska,avi,mpeg,mpegvideo,mpegts,asf'
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192


@contextlib.contextmanager
def reading(source: Path | int) -> Iterator[tuple[Fraction, int, Iterator[np.ndarray]]]:
    """(frames a second, number of frames or 0 where unknown, the frames H W 3 uint8).

    `source` is a file or the number of a camera. Frames come upright, as players show them.
    Raises DataError, also while the frames are read.
    """
    av = _imported(source)
    kind, place = None, str(source)
    if isinstance(source, int):
        kind, pattern = CAMERAS.get(sys.platform, CAMERAS['linux'])
        place = pattern.format(source)
    elif os.path.isfile(source):
        place = os.path.abspath(source)  # FFmpeg takes 'concat:...' for more than a name
    else:
        raise DataError(f'{source} is not a readable video (it is no file): give another')
    options = {} if kind else {'format_whitelist': CONTAINERS, 'protocol_whitelist': 'file'}
    with contextlib.ExitStack() as stack:
        with _readable(av, source):
            container = stack.enter_context(av.open(place, format=kind, options=options))
        if not container.streams.video:
            raise DataError(f'{source} has no picture in it: give a video')
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise DataError(f'{source} is coded in a way that is not known: export it as H.264')
        if stream.width * stream.height > MAX_PIXELS:
            raise DataError(
                f'{source} has frames of {stream.width} x {stream.height}, the limit is '
                f'{MAX_PIXELS} pixels: make it smaller'
            )
        stream.thread_type = 'AUTO'
        stream.codec_context.options = {'max_pixels': str(MAX_PIXELS)}  # sizes may change later
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        yield rate, stream.frames, _frames(av, container, stream, source)


def _frames(av, container, stream, source) -> Iterator[np.ndarray]:
    size = None
    with _readable(av, source):
        for n, frame in enumerate(container.decode(stream), start=1):
            pixels = np.rot90(frame.to_ndarray(format='rgb24'), frame.rotation // 90 % 4)
            size = size or pixels.shape
            if pixels.shape != size:
                raise DataError(
                    f'{source} changes from {size[:2]} to {pixels.shape[:2]} pixels at frame {n}: '
                    'cut it there'
                )
            yield pixels


@contextlib.contextmanager
def writing(path: Path, rate: Fraction, *, exact: bool) -> Iterator[Callable[[np.ndarray], None]]:
    """`write(frame)`, H W 3 or H W uint8, into a video that appears at the end.

    H.264 in .mp4, which every player shows; with `exact` FFV1 in .mkv, which keeps each value.
    After an error, and where no frame came, nothing is left. Raises DataError.
    """
    av = _imported(path)
    with contextlib.ExitStack() as stack:
        container, stream = None, None

        def write(frame: np.ndarray) -> None:
            nonlocal container, stream
            if container is None:
                aside = stack.enter_context(aside_then_rename(path))
                kind = 'matroska' if exact else 'mp4'
                container = stack.enter_context(av.open(str(aside), 'w', format=kind))
                stream = _add_stream(av, container, frame, rate, exact)
            kind = 'gray' if frame.ndim == 2 else 'rgb24'
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=kind)
            container.mux(stream.encode(picture))

        yield write
        if container is not None:
            container.mux(stream.encode())


def _add_stream(av, container, frame: np.ndarray, rate: Fraction, exact: bool) -> Any:
    height, width = frame.shape[:2]
    stream = container.add_stream('ffv1' if exact else 'libx264', rate=rate)
    stream.width, stream.height = width, height
    if exact:
        stream.pix_fmt = 'gray' if frame.ndim == 2 else 'bgr0'
    else:  # colour at half the resolution needs even sides, and is what every player knows
        stream.pix_fmt = 'yuv444p' if width % 2 or height % 2 else 'yuv420p'
        stream.options = {'crf': '18'}
    return stream


@contextlib.contextmanager
def _readable(av, source: Path | int) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = first_line(error)
        if isinstance(source, int):
            raise DataError(
                f'camera {source} does not answer ({reason}): is it plugged in, and yours to read?'
            ) from error
        raise DataError(
            f'{source} is not a readable video ({reason}): copy or export it again'
        ) from error


def _imported(source):
    try:
        return importlib.import_module('av')
    except ImportError as error:
        raise DataError(f'{source} is a video, which needs PyAV: {PIP}') from error
