"""Videos and cameras by PyAV: reads RGB frames, writes RGB or grey frames."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pspnet_jax.data.formats import limits
from pspnet_jax.runtime import storage
from pspnet_jax.runtime.errors import DataError, first_line

logger = logging.getLogger(__name__)

SUFFIXES = ('.mp4', '.mov', '.m4v', '.avi', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv')
# {system: (FFmpeg's name for its cameras, pattern of a camera's number)}.
CAMERAS = {
    'linux': ('v4l2', '/dev/video{}'),
    'darwin': ('avfoundation', '{}'),
    'win32': ('vfwcap', '{}'),
}
# The containers of SUFFIXES. FFmpeg goes by the content: otherwise a file with any name could be a
# playlist of private files or network addresses.
CONTAINERS = 'mov,matroska,avi,mpeg,mpegvideo,mpegts,asf'
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192
MOST_PARTS = 10_000  # of a container that are inspected
MOST_MISSING = 1  # seconds by which a sound file may be shorter than its header claims


@contextlib.contextmanager
def reading(source: Path | int) -> Iterator[tuple[Fraction, int, Iterator[np.ndarray]]]:
    """(frames per second, number of frames or 0 if unknown, the frames H W 3 uint8).

    `source` is a file or the number of a camera. Frames are upright, as players show them. Raises
    DataError, also while the frames are read, and for a file that ends early.
    """
    av = limits.imported('av', source)
    kind, options = None, {}
    if isinstance(source, int):
        kind, pattern = CAMERAS.get(sys.platform, CAMERAS['linux'])
        place = pattern.format(source)
    elif not os.path.isfile(source):
        raise DataError(f'{source} is not a readable video (it is not a file): give another')
    else:
        place = os.path.abspath(source)  # FFmpeg would interpret names such as 'concat:...'
        options = {'format_whitelist': CONTAINERS, 'protocol_whitelist': 'file'}
    with contextlib.ExitStack() as stack:
        with _readable(source):
            container = stack.enter_context(av.open(place, format=kind, options=options))
        if not container.streams.video:
            raise DataError(f'{source} has no video stream: give a video')
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise DataError(f'{source} has an unknown codec: export it as H.264')
        if stream.width * stream.height > MAX_PIXELS:
            raise DataError(
                f'{source} has frames of {stream.width} x {stream.height}, but the limit is '
                f'{MAX_PIXELS} pixels: make it smaller'
            )
        stream.thread_type = 'AUTO'
        stream.codec_context.options = {'max_pixels': str(MAX_PIXELS)}  # sizes may change later
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        if not kind and claimed_bytes(place) > os.path.getsize(place):
            _check_cut(av, place, options, rate)
        yield rate, stream.frames, _frames(container, stream, source, rate)


def _frames(container, stream, source: Path | int, rate: Fraction) -> Iterator[np.ndarray]:
    size, n, reached, whole = None, 0, 0, _seconds(stream)
    try:
        with _readable(source):
            for packet in container.demux(stream):
                at = max((x for x in (packet.pts, packet.dts) if x is not None), default=None)
                if at is not None:
                    reached = max(reached, (at + (packet.duration or 1)) * packet.time_base)
                for frame in packet.decode():
                    n += 1
                    pixels = np.rot90(frame.to_ndarray(format='rgb24'), frame.rotation // 90 % 4)
                    size = size or pixels.shape
                    if pixels.shape != size:
                        raise DataError(
                            f'{source} changes from {size[:2]} to {pixels.shape[:2]} pixels at '
                            f'frame {n}: cut it there'
                        )
                    yield pixels
    except DataError as error:
        if not n or not error.__cause__:
            raise
        expected = stream.frames or round(whole * rate) or 'an unknown number of'
        raise DataError(f'{error}; {n} of {expected} frames were read') from error
    if n and reached + max(MOST_MISSING, 2 / rate) < whole:
        raise _ends_early(source, n, round(whole * rate))


def _seconds(stream) -> float:
    """The stream's duration by its own header; 0 if unknown."""
    if stream.container.format.name == 'avi':  # its count includes dropped frames
        return float(stream.frames / (stream.average_rate or 1))
    written = re.fullmatch(r'(\d+):(\d+):(\d+\.\d+)', stream.metadata.get('DURATION', ''))
    if not written:  # only Matroska has it
        return 0.0
    hours, minutes, seconds = map(float, written.groups())
    return 3600 * hours + 60 * minutes + seconds


def _check_cut(av, place: str, options: dict[str, str], rate: Fraction) -> None:
    """Raise DataError for a file that is cut off, unless only its index is missing."""
    with _readable(place), av.open(place, options=options) as container:
        stream = container.streams.video[0]
        expected = stream.frames or round(_seconds(stream) * rate)
        if not expected and container.duration and len(container.streams) == 1:
            expected = round(container.duration * rate / 10**6)
        there = 0
        with contextlib.suppress(av.error.FFmpegError):
            for packet in container.demux(stream):
                there += packet.size > 0 and not packet.is_corrupt
    if not expected or there < expected:
        raise _ends_early(place, there, expected or 'an unknown number of')
    logger.warning('%s is cut off at its end, but its %d frames are there', place, there)


def _ends_early(source, there: int, expected: int | str) -> DataError:
    return DataError(
        f'{source} ends early: it has {there} of {expected} frames; copy or export it again, or to '
        'use these frames, write them to a new file (ffmpeg -i FILE -c copy NEW)'
    )


def claimed_bytes(path: str | Path) -> int:
    """The file's size that its container claims; 0 if it claims none."""

    def number(place: int, length: int, order: str = 'big') -> int:
        file.seek(place)
        return int.from_bytes(file.read(length), order)

    end, size = 0, os.path.getsize(path)
    with open(path, 'rb') as file:
        head = file.read(16)
        if head[:4] == b'RIFF':  # AVI: one after the other
            for _ in range(MOST_PARTS):
                length = number(end + 4, 4, 'little')
                if number(end, 4) != int.from_bytes(b'RIFF') or length in (0, 2**32 - 1):
                    break
                end += 8 + length
        elif head[4:8] in (b'ftyp', b'wide', b'mdat', b'moov', b'free', b'skip'):  # MP4, MOV
            for _ in range(MOST_PARTS):
                length, first = number(end, 4), 8
                if length == 1:
                    length, first = number(end + 8, 8), 16
                if length < first or end >= size:  # 0: to the end of the file
                    break
                end += length
        elif head[:4] == b'\x1a\x45\xdf\xa3':  # Matroska: a header, and one segment for the rest
            segment = sum(_vint(file, 4)[:2])
            if number(segment, 4) == 0x18538067:
                first, length, known = _vint(file, segment + 4)
                end = first + length if known else 0
        elif head == bytes.fromhex('3026b2758e66cf11a6d900aa0062ce6c'):  # ASF
            file.seek(0)
            place = file.read(2**16).find(bytes.fromhex('a1dcab8c47a9cf118ee400c00c205365'))
            end = number(place + 40, 8, 'little') if place >= 0 else 0
    return end


def _vint(file, place: int) -> tuple[int, int, bool]:
    """(position after it, value, whether it is known) of an EBML number."""
    file.seek(place)
    data = file.read(8).ljust(8, b'\0')
    length = 9 - max(data[0].bit_length(), 1)
    most = 2 ** (7 * length) - 1
    value = int.from_bytes(data[:length], 'big') & most
    return place + length, value, value != most


@contextlib.contextmanager
def writing(path: Path, rate: Fraction, *, exact: bool) -> Iterator[Callable[[np.ndarray], None]]:
    """A function `write(frame)`, H W 3 or H W uint8, for a video that is renamed at the end.

    It is H.264 in .mp4, which every player shows, or with `exact` lossless FFV1 in .mkv. After an
    error, or without frames, no file is left. Raises DataError.
    """
    av = limits.imported('av', path)
    with contextlib.ExitStack() as stack:
        container, stream = None, None

        def write(frame: np.ndarray) -> None:
            nonlocal container, stream
            if container is None:
                aside = stack.enter_context(storage.writing(path))
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
    else:  # every player knows colour at half the resolution, but it needs even sides
        stream.pix_fmt = 'yuv444p' if width % 2 or height % 2 else 'yuv420p'
        stream.options = {'crf': '18'}
    return stream


@contextlib.contextmanager
def _readable(source: Path | str | int) -> Iterator[None]:
    try:
        with limits.reading(source, 'video'):
            yield
    except DataError as error:
        if not isinstance(source, int) or not error.__cause__:
            raise
        raise DataError(
            f'camera {source} does not answer ({first_line(error.__cause__)}): is it plugged in, '
            'and may you read it?'
        ) from error
