"""Limits on untrusted files, checked before anything is allocated or decoded."""

import contextlib
import importlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pspnet_jax.runtime.errors import DataError, NoRoomError, first_line

# Values of one picture or volume, channels counted: a slide of 20,000 x 20,000 RGB has 1.2e9,
# a CT of 512 x 512 x 3,000 has 0.8e9.
MAX_VALUES = 2**31
MAX_SIDE = 2**20  # of a 2D image: Pillow needs memory for every row, however short
MAX_SLICES = 2**14  # pages of a TIFF, files in a folder; a long CT has about 3,000
RATIO = 4096  # about the highest ratio of any image compression
SMALL = 2**26  # bytes that need no check

PIL_FORMATS = ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP')  # some of Pillow's others start programs
PIP = {
    'av': 'av>=18.1,<19',
    'nibabel': 'nibabel>=5.4,<6',
    'pydicom': 'pydicom>=3.0,<4',
    'tifffile': 'tifffile>=2026.3',
    'imagecodecs': 'imagecodecs>=2026.3',
}
MEMINFO, STATUS = Path('/proc/meminfo'), Path('/proc/self/status')
GROUPS, OWN_GROUP = Path('/sys/fs/cgroup'), Path('/proc/self/cgroup')
GROUPS_V1 = ('memory.limit_in_bytes', 'memory.usage_in_bytes')

# Pillow's own limit is too low for slides; `check_size` has ours and checks the free memory.
Image.MAX_IMAGE_PIXELS = MAX_VALUES


@contextlib.contextmanager
def reading(path: object, kind: str) -> Iterator[None]:
    """Turn any exception of a decoder into a DataError."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise NoRoomError(f'{path} needs more memory than is free: cut it up') from error
    except Exception as error:
        remedy = 'copy or export it again'
        if isinstance(error, UnidentifiedImageError) and os.path.getsize(path):
            remedy += ', or save it as PNG: its content is not ' + ', '.join(PIL_FORMATS)
        reason = first_line(error)
        raise DataError(f'{path} is not a readable {kind} ({reason}): {remedy}') from error


def check_size(path: object, shape: Sequence[int], each: int, stored: float = math.inf) -> None:
    """Raise DataError if an array of `shape` with `each` bytes per value is too large for the
    memory, or more than the `stored` bytes can unpack to.
    """
    shape = [int(n) for n in shape]
    words, values = ' x '.join(map(str, shape)), math.prod(shape)
    if min(shape, default=1) < 1:
        raise DataError(f'{path} has the invalid size {words}: copy it again')
    if values > MAX_VALUES:
        raise DataError(
            f'{path} has the size {words}, but the limit is {MAX_VALUES} values: cut it up'
        )
    if values > max(SMALL, RATIO * stored):
        raise DataError(f'{path} is too short for its {words} values: copy it again')
    check_room(path, values * each)


def check_room(path: object, needed: int) -> None:
    """Raise NoRoomError if `path` needs more bytes than are free."""
    if needed > SMALL and needed > (free := free_memory()):
        raise NoRoomError(
            f'{path} needs {needed / 2**20:.0f} MB and {free / 2**20:.0f} MB are free: '
            'close other programs or cut it up'
        )


def check_slices(path: object, count: int, what: str = 'pages') -> None:
    if count > MAX_SLICES:
        raise DataError(f'{path} has more than {MAX_SLICES} {what}: split it')


def imported(name: str, path: object):
    """Import an optional package that `path` needs. Raises DataError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f'{path} needs {name}: pip install "{PIP[name]}"') from error


def free_memory() -> int:
    """Bytes that this program can still use, by the machine, its container and its ulimit.

    If the system does not report free memory, half of the machine's memory counts.
    """
    found = MEMINFO.exists() and re.search(r'MemAvailable: *(\d+) kB', MEMINFO.read_text())
    if found:
        free = 1024 * int(found[1])
    else:
        free = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2
    return max(min([free, *_group_limits(), *_process_limits()]), 0)


def _group_limits() -> Iterator[int]:
    """Bytes left in this process' control groups, which Docker and Slurm set."""
    own = OWN_GROUP.read_text() if OWN_GROUP.exists() else ''
    for root, line, names in (
        (GROUPS, r'^0::(/.*)$', ('memory.max', 'memory.current')),
        (GROUPS / 'memory', r'^\d+:memory:(/.*)$', GROUPS_V1),
    ):
        below = re.search(line, own, re.MULTILINE)
        folder = root / below[1].lstrip('/') if below else root
        for place in (folder, *folder.parents):  # limits of parent groups hold too
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((place / name).read_text()) for name in names)
                stat = (place / 'memory.stat').read_text()
                cache = re.search(r'^inactive_file (\d+)$', stat, re.MULTILINE)
                yield limit - used + (int(cache[1]) if cache else 0)
            if place == root:
                break


def _process_limits() -> Iterator[int]:
    """Bytes left of the address space and data that `ulimit` allows."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        used = 1024 * int(re.search(r'VmSize:\s*(\d+) kB', STATUS.read_text())[1])
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                yield limit - used
