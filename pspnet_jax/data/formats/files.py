"""Finds the images and volumes in a folder, by their endings and DICOM headers."""

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
    """The known ending in lower case, such as '.nii.gz', or ''."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), '')


def stem(path: str | Path) -> str:
    """The file's name without its known ending."""
    name = Path(path).name
    return name[: len(name) - len(suffix(path))]


def numbers_in_order(path: Path) -> list:
    """A sort key that puts slice_2 before slice_10."""
    parts = re.split(r'(\d+)', path.name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def below(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Every file in the folder and its subfolders with one of the endings, sorted, without hidden
    ones.
    """
    return [
        path
        for path in sorted(folder.rglob('*'))
        if path.name.lower().endswith(endings)
        and not any(part.startswith('.') for part in path.relative_to(folder).parts)
        and path.is_file()
    ]


def find(folder: str | Path) -> dict[str, Path]:
    """{path below the folder, without ending: file} of the images and volumes in it, sorted.

    Names are NFC, unlike those of macOS. DICOM files are grouped by `gather`; hidden files are left
    out. One DataError lists all symlinks that lead out of the folder, files that differ only by
    their ending, and folders that can't be listed.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f'{folder} is not a folder: give the one that holds the images')
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
        raise DataError(f'{folder} holds no images: the known endings are {", ".join(SUFFIXES)}')
    return dict(sorted(found.items()))


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its ending, or by its first bytes if the ending is unknown."""
    return suffix(path) in DICOM or (not suffix(path) and path.is_file() and says_dicom(path))


def says_dicom(path: Path) -> bool:
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        return file.read(132)[128:] == b'DICM'
    return False


def gather(
    paths: Iterable[Path], root: Path, whole: bool = True
) -> tuple[list[Path], dict[Path, str]]:
    """(paths to `read`, {skipped file: what it holds}) of DICOM files in `root`.

    A folder is one volume if two or more of its files are slices of one series with a position, or
    if it holds a single file. In other folders each image stands alone (radiographs, ultrasound);
    so it does in `root`, unless `whole` allows that folder to be a volume. Files without an image
    (RTSTRUCT, reports) are skipped if there are images in the folder.
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
                '%s itself holds the slices of %d DICOM series, which count as single images: to '
                'read volumes, put each series into a folder of its own', folder, len(series),
            )  # fmt: skip
        entries += pictures
    if others:
        logger.info('skipped files without an image: %s', dicom.named(others))
    return entries, others
