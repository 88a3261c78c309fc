"""Which pictures and volumes a folder holds, by their endings and by what DICOM files say."""

import collections
import contextlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from pspnet_jax.data.formats import dicom
from pspnet_jax.runtime.errors import DataError, all_faults

logger = logging.getLogger(__name__)

PICTURES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')
NIFTI = ('.nii', '.nii.gz')
DICOM = ('.dcm', '.dicom', '.ima')
SUFFIXES = (*PICTURES, *NIFTI, *DICOM, '.npy')


def suffix(path: str | Path) -> str:
    """The known ending, in small letters, or ''; '.nii.gz' is one."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), '')


def stem(path: str | Path) -> str:
    """The file's name without its known ending."""
    name = Path(path).name
    return name[: len(name) - len(suffix(path))]


def numbers_in_order(path: Path) -> list:
    """A key by which slice_2 comes before slice_10."""
    parts = re.split(r'(\d+)', path.name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def below(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Every file in the folder and below with one of the endings, in the order of their names, but
    for what systems and editors leave behind a leading dot.
    """
    return [
        path
        for path in sorted(folder.rglob('*'))
        if path.name.lower().endswith(endings)
        and not any(part.startswith('.') for part in path.relative_to(folder).parts)
        and path.is_file()
    ]


def find(folder: str | Path) -> dict[str, Path]:
    """{path below the folder, without ending: file}, in order, of the pictures and volumes in it.

    Names are NFC, which macOS does not keep. DICOM goes as `gather` says; hidden files are left
    out. One DataError lists every symlink that leads out of the folder, every two files that differ
    by their ending alone and every folder that is closed.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f'{folder} is not a folder: give the one that holds the pictures')
    root, found, faults, closed = os.path.realpath(folder), {}, [], []
    for here, folders, names in os.walk(folder, onerror=closed.append):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        paths = [Path(here, name) for name in sorted(names) if not name.startswith('.')]
        for path in [Path(here, name) for name in folders] + paths:
            target = os.path.realpath(path)
            if path.is_symlink() and os.path.commonpath((root, target)) != root:
                faults.append(f'{path} is a link to {target}, outside of {folder}: copy it there')
        medical = [path for path in paths if is_dicom(path)]
        flat = [path for path in paths if suffix(path) and path not in medical]
        for path in flat + gather(medical, folder, whole=False)[0]:
            name = path.name if path.is_dir() else stem(path)
            name = unicodedata.normalize('NFC', (path.parent / name).relative_to(folder).as_posix())
            if found.setdefault(name, path) != path:
                faults.append(f'{found[name]} and {path} are both called {name}: rename one')
    faults += [f'{error.filename} can not be listed ({error.strerror})' for error in closed]
    if faults:
        raise all_faults(folder, faults)
    if not found:
        raise DataError(f'{folder} holds no picture: the endings known are {", ".join(SUFFIXES)}')
    return dict(sorted(found.items()))


def is_dicom(path: Path) -> bool:
    """By the ending, or by its first bytes where there is none that is known."""
    return suffix(path) in DICOM or (not suffix(path) and path.is_file() and says_dicom(path))


def says_dicom(path: Path) -> bool:
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        return file.read(132)[128:] == b'DICM'
    return False


def gather(
    paths: Iterable[Path], root: Path, whole: bool = True
) -> tuple[list[Path], dict[Path, str]]:
    """(what to `read`, {file that is passed over: what it holds}) of DICOM files below `root`.

    A folder is one volume, and goes by its name, where two or more of its files are slices that
    share their series and say where they lie; so does one that holds a single file. Of other
    folders each picture is by itself (radiographs, ultrasound), and of `root` unless it may be the
    `whole` volume. What holds no picture (RTSTRUCT, reports) is passed over where pictures are
    beside it.
    """
    folders = collections.defaultdict(list)
    for path in sorted(paths):
        folders[path.parent].append(path)
    entries, others = [], {}
    for folder, own in folders.items():
        looks = {path: look for path in own if (look := dicom.look(path))}
        pictures = [path for path in own if path not in looks or not looks[path].other] or own
        others |= {path: looks[path].other for path in own if path not in pictures}
        series = collections.Counter(look.series for look in looks.values() if look.series)
        volume = max(series.values(), default=0) > 1
        by_name = volume or not looks or (len(pictures) == 1 and folder != root)
        if by_name and (whole or folder != root):
            entries.append(folder)
            continue
        if volume:
            logger.warning(
                '%s itself holds the slices of %d DICOM series, which count as pictures: put each '
                'series into a folder of its own, and they are volumes', folder, len(series),
            )  # fmt: skip
        entries += pictures
    if others:
        logger.info('passed over, as they hold no picture: %s', dicom.named(others))
    return entries, others
