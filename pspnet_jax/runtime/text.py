"""Limits on untrusted files. Text and JSON are limited in size, depth and time; arrays are limited
by the size of their file. Each fault is a DataError.
"""

import contextlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pspnet_jax.runtime.errors import DataError, one_line

# A COCO file of about 100,000 outlines. Parsed text takes up to 30 times as much memory.
MAX_BYTES = 2**26
NOTE = 100_000  # bytes of a small file that a run writes for itself
MOST_TIMES = 100  # most that a weight file may expand: weights barely compress, zeros do


def read(path: str | Path, remedy: str = 'make it again', most: int | None = None) -> str:
    """Read UTF-8, with or without a byte order mark, of at most `most` bytes (None: MAX_BYTES).

    Raises DataError, also if `path` is not a regular file.
    """
    if not os.path.isfile(path):  # a FIFO or a device would never end
        raise DataError(f'{path} is not a file: {remedy}')
    try:
        with open(path, 'rb') as file:
            data = file.read((most or MAX_BYTES) + 1)
    except OSError as error:
        raise DataError(f'{path} can not be read ({error.strerror}): copy it again') from error
    if most and len(data) > most:
        raise DataError(f'{path} is larger than {most:,} bytes: {remedy}')
    if len(data) > MAX_BYTES:
        raise DataError(f'{path} is larger than {MAX_BYTES // 2**20} MiB: split it')
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataError(
            f'{path} is not UTF-8 text (byte {error.start}): save it as UTF-8 in an editor, or '
            'convert it with iconv -f GBK -t UTF-8 (instead of GBK its own encoding: UTF-16, '
            'SHIFT-JIS, CP1252)'
        ) from error


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Raise DataError if the block takes longer: a regular expression may backtrack for ever.

    It uses a timer, which only the main thread has; other threads have no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, 'SIGALRM'):
        yield
        return

    def stop(*_) -> None:
        raise DataError(f'{what} takes more than {seconds:g} seconds: write it in a simpler way')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parse_json(text: str, remedy: str = 'make it again') -> Any:
    """Parse strict JSON. Raises DataError for anything else, including NaN and infinity, for a
    duplicate key and for too deep nesting.
    """

    def unique(pairs):
        if len(found := dict(pairs)) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f'the key {twice[:120]!r} is there twice')
        return found

    def refuse(constant):
        raise ValueError(f'{constant} is not a number')

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise DataError(f'nested too deeply: {remedy}') from error
    except ValueError as error:
        reason = one_line(str(error).partition('\n')[0])
        raise DataError(f'not readable as JSON ({reason}): {remedy}') from error


def read_json(path: str | Path, remedy: str = 'make it again', most: int | None = None) -> Any:
    """Read and parse a JSON file. Raises DataError."""
    content = read(path, remedy, most)
    try:
        return parse_json(content, remedy)
    except DataError as error:
        raise DataError(f'{path} is {error}') from error


def too_much(path: str | Path, claimed: int, stored: int, most: int) -> str:
    """Why a file of `stored` bytes can't hold weights of `claimed` bytes; '' if it can.

    More than `most` bytes are always refused. Call it before anything of that size is allocated.
    """
    most = min(most, 2**26 + MOST_TIMES * stored)
    if claimed <= most:
        return ''
    return (
        f'{path} claims to hold {claimed / 2**20:,.0f} MiB, but a file of its size may hold at '
        f'most {most / 2**20:,.0f}: it is corrupted, or made to exhaust the memory'
    )
