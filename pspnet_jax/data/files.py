"""Every picture and volume format in; label volumes and probabilities out, in the geometry of
their input.

Flat pictures (png, jpg, bmp, tif, webp; 8 and 16 bit; grey, palette, RGB, RGBA) keep their grid,
upright as viewers show it.
Volumes with a position in space (NIfTI, DICOM series) are turned by quarters, never resampled,
into one orientation, that in which radiologists look at them: slices from the feet to the head,
rows from front to back, columns from the patient's right to the left. A volume of a single
coronal or sagittal slice is that slice, head up. `Geometry` remembers how to turn back.

Files are not trusted: what a file says of its size is checked before it is allocated, nothing is
unpickled, and whatever is wrong becomes one DataError.
"""

import collections
import contextlib
import gzip
import importlib
import importlib.util
import itertools
import logging
import math
import os
import re
import secrets
import socket
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pspnet_jax.data import tiff
from pspnet_jax.data.volumes import free_memory
from pspnet_jax.errors import DataError, NoRoomError, first_line, not_written

logger = logging.getLogger(__name__)

# The first of a kind is named in the log, the others are like it.
_with_alpha, _fourth_bands, _alpha_masks, _white_is_zero = (itertools.count() for _ in range(4))

PICTURES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')
NIFTI = ('.nii', '.nii.gz')
DICOM = ('.dcm', '.dicom', '.ima')
SUFFIXES = (*PICTURES, *NIFTI, *DICOM, '.npy')

# Values of one picture or volume, channels counted: a slide of 20,000 x 20,000 RGB has 1.2e9,
# a CT of 512 x 512 x 3,000 has 0.8e9.
MAX_VALUES = 2**31
MAX_SIDE = 2**20  # of a flat picture, as Pillow needs memory for every row, however short
MAX_SLICES = 2**14  # pages of a TIFF, files of a folder; a long CT has some 3,000
MAX_SCANS = 100  # of a JPEG, each of which visits every pixel; programs write some 10
MAX_EXTENSIONS = 2**24  # bytes between the header of a NIfTI file and its voxels
GZIP_RATIO = 1032  # the most that deflate can shrink
PICTURE_RATIO = 4096  # and, roughly, what any compression of a picture can
SMALL = 2**26  # bytes that are not worth a question

# Pillow's own limit is half a slide; `_check_picture` has ours, and looks at the free memory.
Image.MAX_IMAGE_PIXELS = MAX_VALUES

_HOST = re.sub('[^A-Za-z0-9-]', '-', socket.gethostname())[:40]  # in the names of `writing`

PIL_FORMATS = ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP')  # others of PIL's start programs
PIP = {
    'nibabel': 'nibabel>=5.4,<6',
    'pydicom': 'pydicom>=3.0,<4',
    'tifffile': 'tifffile>=2026.3',
    'imagecodecs': 'imagecodecs>=2026.3',
}
# The directions in which slices, rows and columns go, by the axis that is sliced.
VIEWS = {'axial': 'SPL', 'coronal': 'PIL', 'sagittal': 'LIP'}
PLACE = ('ImagePositionPatient', 'ImageOrientationPatient')  # of a DICOM slice
DEFLATED = '1.2.840.10008.1.2.1.99'  # inflated by pydicom whole, however much it gives
DICOM_TOOLS = {  # what makes a mask of that which is none
    'SEG': 'convert it to NIfTI, for instance by segimage2itkimage of dcmqi, or by highdicom',
    'RTSTRUCT': 'convert it to NIfTI, for instance by plastimatch or dcmrtstruct2nii',
}
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's axes to NIfTI's
COMPRESSION = 0x0103  # tag of a TIFF; 1 is none
ORIENTATION = 0x0112  # EXIF tag: how cameras say that they were held upright
# Its value -> the pixels H W C as viewers and annotation tools show them.
UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


class Geometry(NamedTuple):
    """Where a volume lies in space, and how its file's axes became D, H, W."""

    affine: np.ndarray  # 4x4: voxel of the file -> position, towards right, front, head
    shape: tuple[int, int, int]  # of the file
    axes: tuple[int, int, int]  # of the file, that D, H and W are
    flips: tuple[bool, bool, bool]  # is D, H, W reversed
    header: Any = None  # nibabel's; None for DICOM


class SliceFiles(NamedTuple):
    """A folder of flat pictures, in the order of the slices."""

    names: tuple[str, ...]


class Picture(NamedTuple):
    """image D H W C uint8, uint16 or float32; (slice, row, column) spacing in mm or None.

    `geometry` is None for flat pictures, pages and arrays.
    """

    image: np.ndarray
    spacing: tuple[float, float, float] | None
    geometry: Geometry | SliceFiles | None
    source: Path


def read(path: str | Path) -> Picture:
    """The picture or volume of a file, of a folder of slices or of a folder with a DICOM series.

    Grey gives C = 1; palette, RGB and RGBA C = 3 (alpha is dropped, which the log says); TIFFs the
    channels and bands that they name, a 4-dimensional NIfTI its last axis. Negatives (TIFF, DICOM)
    come as viewers show them. Whole numbers from 0 to 65535 stay whole, others become
    float32 with the file's slope and intercept applied. Values that are no number become 0, which
    the log says. Arrays (.npy) are D H W C, H W C or H W. Raises DataError.
    """
    path = Path(path).expanduser()
    picture = _load(path, labels=False)
    return picture._replace(image=_as_image(picture.image, path))


def read_labels(path: str | Path, like: Picture | None = None) -> np.ndarray:
    """D H W integers, or D H W 3 of an RGB mask: the values as they are stored.

    Palette pictures give their indices (`read_palette` the colours), 1-bit ones 0 and 1, those of
    one colour their alpha. Volumes are turned as `read` turns them; with `like`, the image that the
    mask belongs to, size and place in space must agree. Arrays (.npy) are D H W or H W. Raises
    DataError, for values that are not whole too.
    """
    path = Path(path).expanduser()
    mask = _load(path, labels=True)
    labels = _as_labels(mask.image, path)
    if labels.shape[-1] == 1:
        labels = labels[..., 0]
    elif labels.shape[-1] != 3 or _suffix(path) in NIFTI:
        raise DataError(
            f'{path} has {labels.shape[-1]} values a voxel, a mask has one: save a volume of labels'
        )
    if like is not None:
        _check_same_grid(mask._replace(image=labels), like)
    return labels


def read_palette(path: str | Path) -> np.ndarray | None:
    """D H W 3 uint8: what `read_labels` gives, in the colours that a palette shows; None of masks
    that have none. Raises DataError.
    """
    path = Path(path).expanduser()
    if _suffix(path) not in PICTURES or os.path.isdir(path):
        return None
    with _reading(path, 'picture'):
        is_tiff = tiff.starts_tiff(path)
        pages = _count_pages(path) if is_tiff else 1
        if is_tiff and tiff.beyond_pillow(path, pages, labels=True):
            return None
        shown = []
        with Image.open(path, formats=PIL_FORMATS) as picture:
            for page in range(pages if picture.mode == 'P' else 0):
                if pages > 1:
                    picture.seek(page)
                _check_picture(picture, path, 3 * pages, path.stat().st_size)
                turn = UPRIGHT.get(orientation(picture), np.asarray)
                shown.append(turn(np.array(picture.convert('RGB'))))
        return np.stack(shown) if shown else None


def stack(pictures: Sequence[Picture]) -> Picture:
    """One picture of the channels of several (the sequences of an MRI), in their order.

    Raises DataError where size, spacing or place in space differ.
    """
    first = pictures[0]
    if len(pictures) == 1:
        return first
    for other in pictures[1:]:
        _check_same_grid(other, first)
    size = sum(picture.image.size for picture in pictures)
    dtype = np.result_type(*(picture.image.dtype for picture in pictures))
    _check_size(first.source, (size,), dtype.itemsize)
    image = np.concatenate([picture.image for picture in pictures], axis=-1, dtype=dtype)
    return first._replace(image=image)


def stem(path: str | Path) -> str:
    """The file's name without its suffix; '.nii.gz' is one suffix."""
    name = Path(path).name
    return name[: len(name) - len(_suffix(path))]


def find(folder: str | Path) -> dict[str, Path]:
    """{path below the folder, without ending: file}, in order, of the pictures and volumes in it.

    Names are NFC, which macOS does not keep. DICOM goes as `gather_dicom` says; hidden files are
    left out. One DataError lists every symlink that leads out of the folder, every two files that
    differ by their ending alone and every folder that is closed.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f'{folder} is not a folder: give the one that holds the pictures')
    root = os.path.realpath(folder)
    found: dict[str, Path] = {}
    faults = []
    closed = []
    for here, folders, names in os.walk(folder, onerror=closed.append):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        names = sorted(name for name in names if not name.startswith('.'))
        for name in (*folders, *names):
            path = Path(here, name)
            target = os.path.realpath(path)
            if path.is_symlink() and os.path.commonpath((root, target)) != root:
                faults.append(f'{path} is a link to {target}, outside of {folder}: copy it there')
        paths = [Path(here, name) for name in names]
        dicom = [path for path in paths if is_dicom(path)]
        entries, _ = gather_dicom(dicom, folder, whole=False)
        for path in [path for path in paths if _suffix(path) and path not in dicom] + entries:
            name = path.name if path.is_dir() else stem(path)
            name = unicodedata.normalize('NFC', (path.parent / name).relative_to(folder).as_posix())
            if name in found:
                faults.append(f'{found[name]} and {path} are both called {name}: rename one')
            found.setdefault(name, path)
    faults += [f'{error.filename} can not be listed ({error.strerror})' for error in closed]
    if faults:
        raise DataError(f'{len(faults)} fault(s) in {folder}:', faults)
    if not found:
        raise DataError(f'{folder} holds no picture: the endings known are {", ".join(SUFFIXES)}')
    return dict(sorted(found.items()))


def is_dicom(path: Path) -> bool:
    """By the ending, or by its first bytes where there is none that is known."""
    return _suffix(path) in DICOM or (not _suffix(path) and path.is_file() and _says_dicom(path))


def gather_dicom(
    dicom: Iterable[Path], root: Path, whole: bool = True
) -> tuple[list[Path], dict[Path, str]]:
    """(what to `read`, {file that is passed over: what it holds}) of DICOM files below `root`.

    A folder is one volume, and goes by its name, where two or more of its files are slices that
    share their series and say where they lie; so does one that holds a single file. Of other
    folders each picture is by itself (radiographs, ultrasound), and of `root` unless it may be the
    `whole` volume. What holds no picture (RTSTRUCT, reports) is passed over where pictures are
    beside it.
    """
    folders: dict[Path, list[Path]] = {}
    for path in sorted(dicom):
        folders.setdefault(path.parent, []).append(path)
    entries, others = [], {}
    for folder, paths in folders.items():
        looks = {path: _look_at_dicom(path) for path in paths}
        pictures = [path for path in paths if not (looks[path] and looks[path].other)] or paths
        others |= {path: looks[path].other for path in paths if path not in pictures}
        series = collections.Counter(look.series for look in looks.values() if look and look.series)
        volume = max(series.values(), default=0) > 1
        by_name = volume or not any(looks.values()) or (len(pictures) == 1 and folder != root)
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
        logger.info('passed over, as they hold no picture: %s', _named(others))
    return entries, others


class _Look(NamedTuple):
    """At a DICOM header: the series of a slice that says where it lies, else ''; and what it is
    that holds no picture, else ''.
    """

    series: str
    other: str


def _look_at_dicom(path: Path) -> _Look | None:
    """None of what can't be read, which reading reports."""
    tags = ['SeriesInstanceUID', 'SOPClassUID', 'Modality', 'Rows', *PLACE]
    try:
        pydicom = _imported('pydicom', path)
        if _dicom_syntax(path, pydicom) == DEFLATED:
            return None
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
        placed = all(header.get(tag) for tag in PLACE)
        return _Look(str(header.get('SeriesInstanceUID', '')) * placed, _no_picture(header))
    except Exception:  # of any kind, as decoders raise what a damaged file leads them to
        return None


def _named(others: Mapping[Path, str]) -> str:
    """'rs.dcm (RTSTRUCT), sr.dcm (SR) and 3 more'."""
    some = ', '.join(f'{path.name} ({what})' for path, what in list(others.items())[:8])
    return some + (f' and {len(others) - 8} more' if len(others) > 8 else '')


def output_suffix(like: Picture) -> str:
    """The ending of what is written for a picture: .nii.gz, .nii, .tif, .npy, .png; '' for a
    folder of slices, whose masks are a folder.
    """
    if isinstance(like.geometry, SliceFiles):
        return ''
    if isinstance(like.geometry, Geometry):
        return '.nii' if _suffix(like.source) == '.nii' else '.nii.gz'
    if _suffix(like.source) == '.npy':
        return '.npy'
    return '.tif' if len(like.image) > 1 else '.png'


def write_labels(path: str | Path, labels_DHW: np.ndarray, like: Picture) -> None:
    """Write whole numbers on the grid of `like`'s file; `path` ends as `output_suffix` says.

    NIfTI and DICOM: a NIfTI volume of the input's shape, orientation and affine. Pages: a TIFF of
    as many. Flat: a PNG of 8 bits, or 16 where a label is above 255; for a folder of slices a
    folder of PNGs with their names. Raises DataError; then nothing is left of the file.
    """
    labels_DHW = _as_labels(labels_DHW, path)
    kinds = (np.uint8, np.int16, np.int32) if isinstance(like.geometry, Geometry) else ()
    kinds = kinds or (np.uint8, np.uint16)
    low, high = int(labels_DHW.min(initial=0)), int(labels_DHW.max(initial=0))
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return _write(Path(path), labels_DHW.astype(kind), like)
    raise DataError(f'{path}: labels from {low} to {high} do not fit {np.dtype(kinds[-1]).name}')


def write_probabilities(path: str | Path, prob_DHW: np.ndarray, like: Picture) -> None:
    """Write one class' probabilities, 0 to 1, where `write_labels` writes labels.

    float32; in a PNG 16 bits, where 65535 stands for 1. Raises DataError.
    """
    if output_suffix(like) in ('.png', ''):
        prob_DHW = np.rint(np.clip(prob_DHW, 0, 1) * 65535).astype(np.uint16)
    else:
        prob_DHW = prob_DHW.astype(np.float32)
    _write(Path(path), prob_DHW, like)


def open_picture(path: Path) -> Image.Image:
    """The decoded picture, of several pages the first. Raises DataError."""
    if not os.path.isfile(path):
        raise DataError(f'{path} is not a file: give a picture')
    with _reading(path, 'picture'):
        picture = Image.open(path, formats=PIL_FORMATS)
        _check_picture(picture, path, 1, path.stat().st_size)
        picture.load()
        return picture


# What is in a file: a Picture whose image D H W C still has the file's own kind of numbers.


def _load(path: Path, labels: bool) -> Picture:
    if os.path.isdir(path):
        return _load_folder(path, labels)
    if not os.path.isfile(path):
        raise DataError(f'{path} is not there: give a picture, a volume or a folder of slices')
    kind = _suffix(path)
    if kind in NIFTI:
        return _load_nifti(path, labels)
    if kind == '.npy':
        return _load_array(path, labels)
    if kind in PICTURES:
        return Picture(_load_pages([path], labels), None, None, path)
    if kind in DICOM or _says_dicom(path):
        return _load_dicom([path], path, labels)
    raise DataError(f'{path} is of no known kind: the endings known are {", ".join(SUFFIXES)}')


def _load_folder(folder: Path, labels: bool) -> Picture:
    with _reading(folder, 'folder'):
        files = [path for path in folder.iterdir() if path.is_file() and path.name[0] != '.']
    pictures = sorted((path for path in files if _suffix(path) in PICTURES), key=_numbers_in_order)
    dicom = sorted(path for path in files if is_dicom(path))
    if not pictures and not dicom:
        raise DataError(f'{folder} holds neither slices ({", ".join(PICTURES)}) nor DICOM files')
    if pictures and dicom:
        raise DataError(f'{folder} holds {pictures[0].name} and {dicom[0].name}: keep one kind')
    if len(files) > MAX_SLICES:
        raise DataError(f'{folder} holds {len(files)} files, the limit is {MAX_SLICES}: split it')
    if dicom:
        return _load_dicom(dicom, folder, labels)
    names = SliceFiles(tuple(path.name for path in pictures))
    return Picture(_load_pages(pictures, labels), None, names, folder)


def _load_pages(paths: Sequence[Path], labels: bool) -> np.ndarray:
    """D H W C of one picture, its pages, or pictures that are the slices of a volume."""
    image, d = None, 0
    for path in paths:
        with _reading(path, 'picture'):
            for page, (pages, pixels) in enumerate(_pages(path, labels, len(paths))):
                if pages > 1 and len(paths) > 1:
                    raise DataError(
                        f'{path} has {pages} pages among single slices: read it by itself'
                    )
                if image is None:
                    image = np.empty((len(paths) * pages, *pixels.shape), pixels.dtype)
                if (pixels.shape, pixels.dtype) != (image.shape[1:], image.dtype):
                    raise DataError(
                        f'{path}{f", page {page + 1}," if pages > 1 else ""} is '
                        f'{pixels.shape} {pixels.dtype}, {paths[0]} {image.shape[1:]} '
                        f'{image.dtype}: the slices of a volume are alike'
                    )
                image[d] = pixels
                d += 1
    return image


def _pages(path: Path, labels: bool, beside: int) -> Iterator[tuple[int, np.ndarray]]:
    """(how many there are, H W C) of each page of one of `beside` files that are read together."""
    is_tiff = tiff.starts_tiff(path)
    pages = _count_pages(path) if is_tiff else 1
    if is_tiff and (why := tiff.beyond_pillow(path, pages, labels)):
        values = _by_tifffile(path, why, labels)
        yield from ((len(values), pixels) for pixels in values)
        return
    with Image.open(path, formats=PIL_FORMATS) as picture:
        for page in range(pages):
            if pages > 1:
                picture.seek(page)
            _check_picture(picture, path, beside * pages, path.stat().st_size * beside)
            turn = UPRIGHT.get(orientation(picture), np.asarray)
            yield pages, turn((_label_pixels if labels else _image_pixels)(picture, path, page))


def _by_tifffile(path: Path, why: str, labels: bool) -> np.ndarray:
    """D H W C of a TIFF that is not Pillow's; channels are those that its metadata names."""
    needed = 'tifffile'
    try:
        packed = tiff.compression(path)
        if packed not in tiff.UNPACKED:
            raise DataError(
                f'{path} {why}: save it uncompressed, for instance by tifffile and imagecodecs: '
                "python -c \"import tifffile as t; t.imwrite('NEW.tif', t.imread('OLD.tif'))\""
            )
        tifffile = importlib.import_module('tifffile')
        if packed != 1:
            needed = importlib.import_module('imagecodecs').__name__
    except ImportError as error:
        both = ' '.join(f'"{PIP[name]}"' for name in ('tifffile', 'imagecodecs'))
        pip = both if packed != 1 else f'"{PIP[needed]}"'
        raise DataError(f'{path} {why}: to read it, pip install {pip}') from error
    with tifffile.TiffFile(path, _multifile=False) as file:  # others that it names are not opened
        first, *others = file.series
        if file.is_ome and first.kind != 'ome':
            raise DataError(f'{path} has OME planes in other files, or damaged: export it as one')
        if any(not series.keyframe.is_reduced for series in others):
            raise DataError(f'{path} holds {1 + len(others)} images: save each as a file')
        _check_size(path, first.shape, first.dtype.itemsize)
        size = math.prod(first.shape)
        if size > max(SMALL, PICTURE_RATIO * path.stat().st_size):
            words = ' x '.join(map(str, first.shape))
            raise DataError(f'{path} is too short for its {words} values: copy it again')
        if any(page is None for page in first.pages):
            raise DataError(f'{path} lacks pages that its metadata names: export it again')
        values = tiff.arrange(first.asarray(maxworkers=1), first.axes, path)
        white_is_zero = first.keyframe.photometric == tiff.WHITE_IS_ZERO
    if len(values) > MAX_SLICES:
        raise DataError(f'{path} has more than {MAX_SLICES} pages: split it')
    return _brighter_is_higher(values, path) if white_is_zero and not labels else values


def _brighter_is_higher(values: np.ndarray, path: Path) -> np.ndarray:
    """Of an image that is stored as a negative, what viewers show; Pillow does it at 8 bits."""
    if values.dtype.kind != 'u':
        raise DataError(f'{path} stores white as 0 in {values.dtype}: save it with black as 0')
    return np.iinfo(values.dtype).max - values


def _check_picture(picture: Image.Image, path: Path, pictures: int, stored: int) -> None:
    """Raise DataError where `pictures` like this one are too many values, or too many for the
    bytes that hold them, before they are decoded.
    """
    size = (pictures, *picture.size[::-1], len(picture.getbands()))
    _check_size(path, size, _dtype_of(picture).itemsize)
    if max(picture.size) > MAX_SIDE:
        words = ' x '.join(map(str, picture.size[::-1]))
        raise DataError(f'{path} is {words}, the limit is {MAX_SIDE} pixels a side: cut it up')
    if picture.format in ('JPEG', 'MPO'):
        scans = path.read_bytes().count(b'\xff\xda')  # which coded pixels can't be
        if scans > MAX_SCANS:
            raise DataError(f'{path} has {scans} scans, the limit is {MAX_SCANS}: save it again')
    ratio = PICTURE_RATIO * (8 if picture.mode == '1' else 1)
    if math.prod(size) > max(SMALL, ratio * stored):
        words = ' x '.join(map(str, size))
        raise DataError(f'{path} is too short for its {words} values: copy it again')


def _count_pages(path: Path) -> int:
    """Pages of a TIFF along their directories, as Pillow goes, but without reading the entries:
    directories that overlap make a file of 1 MB hours of work.
    """
    size = path.stat().st_size
    with open(path, 'rb') as file:
        head = file.read(16)
        order = 'little' if head[:2] == b'II' else 'big'
        of_count, of_entry, of_place = (8, 20, 8) if head[2] == 43 else (2, 12, 4)  # bytes
        place = int.from_bytes(head[of_place : 2 * of_place], order)
        seen, used = set(), 0
        while place and place not in seen:  # what leads back ends there
            seen.add(place)
            file.seek(place)
            entries = of_entry * int.from_bytes(file.read(of_count), order)
            used += entries
            if len(seen) > MAX_SLICES:
                raise DataError(f'{path} has more than {MAX_SLICES} pages: split it')
            if used > size:
                raise DataError(f'{path} has pages that lie on one another: copy it again')
            file.seek(entries, os.SEEK_CUR)
            place = int.from_bytes(file.read(of_place), order)
    return len(seen)


def orientation(picture: Image.Image) -> int:
    """The turn that is left to do, of UPRIGHT; 1 for none. Pillow turns TIFFs itself.

    Raises DataError for those that it turns wrongly.
    """
    if picture.format == 'PNG' and 'exif' not in picture.info:  # where Pillow would decode it
        return 1
    if picture.format != 'TIFF':
        return picture.getexif().get(ORIENTATION, 1)
    tags = picture.tag_v2
    if tags.get(ORIENTATION, 1) in (5, 6, 7, 8) and tags.get(COMPRESSION, 1) == 1:
        raise DataError(
            f'{picture.filename} is stored turned and without compression, which is not read: '
            'save it upright'
        )
    return 1


def turn_by_exif(path: Path) -> int:
    """The orientation that a picture's file asks for, of UPRIGHT; 1 of all else."""
    if _suffix(path) not in PICTURES or not os.path.isfile(path):
        return 1
    try:
        with Image.open(path, formats=PIL_FORMATS) as picture:
            if picture.format == 'TIFF':
                return picture.tag_v2.get(ORIENTATION, 1)
            return orientation(picture)
    except Exception:  # of any kind, as decoders raise; reading reports it
        return 1


def is_square(path: Path) -> bool:
    try:
        with Image.open(path, formats=PIL_FORMATS) as picture:
            return picture.width == picture.height
    except Exception:
        return False


def _dtype_of(picture: Image.Image) -> np.dtype:
    deep = picture.mode in ('I', 'F')
    return np.dtype(np.float32 if deep else np.uint16 if '16' in picture.mode else np.uint8)


def _image_pixels(picture: Image.Image, path: Path, page: int) -> np.ndarray:
    """H W C: grey as one channel, colour as three."""
    if picture.mode in ('LA', 'PA', 'RGBA') and not next(_with_alpha):
        logger.info('%s: alpha is dropped, here and in others', path)
    if picture.mode in ('RGB', 'RGBA') and _is_deep(picture):
        return _deep_colour(picture, path, page)
    _warn_of_fourth_band(picture, path)
    if picture.mode in ('P', 'PA', 'RGBA'):
        picture = picture.convert('RGB')
    elif picture.mode in ('1', 'LA'):
        picture = picture.convert('L')
    elif picture.mode not in ('L', 'RGB', 'F') and picture.mode[0] != 'I':
        raise DataError(f'{path} is {picture.mode}: convert it to grey or RGB')
    pixels = np.array(picture)
    if picture.mode == 'I' and picture.format == 'TIFF' and tiff.is_unsigned(picture):
        pixels = pixels.view(np.uint32)  # Pillow has no such mode
    if pixels.dtype == np.uint16 and _is_white_zero(picture):
        pixels = _brighter_is_higher(pixels, path)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _warn_of_fourth_band(picture: Image.Image, path: Path) -> None:
    """Some programs say of any fourth band that it is alpha: near infrared, a fourth stain."""
    if picture.mode != 'RGBA' or picture.format != 'TIFF':
        return
    different = len(np.unique(np.array(picture)[..., 3]))
    if different > 2 and not next(_fourth_bands):
        logger.warning(
            '%s says that its fourth band, of %d different values, is alpha: it is dropped, here '
            'and in others; if it is a channel, save the TIFF with ExtraSamples 0',
            path,
            different,
        )


def _label_pixels(picture: Image.Image, path: Path, page: int) -> np.ndarray:
    """H W C: one channel, or the three of an RGB mask, as they are stored.

    Where all is of one colour and alpha is not, the mask is alpha.
    """
    if picture.mode == 'PA':
        raise DataError(f'{path} has a palette with alpha: save the mask without alpha')
    if picture.mode in ('1', 'P'):
        return np.array(picture)[..., None]
    if _is_white_zero(picture):
        if not next(_white_is_zero):
            logger.warning(
                '%s says that 0 is white: of masks, here and in others, the stored values count',
                path,
            )
        stored = np.array(picture)[..., None]
        return 255 - stored if picture.mode == 'L' else stored  # Pillow turned 8 bits round
    if picture.mode in ('LA', 'RGBA'):
        pixels = np.array(picture)
        colour, alpha = pixels[..., :-1], pixels[..., -1:]
        if (colour == colour[:1, :1]).all() and (alpha < 255).any():
            if not next(_alpha_masks):
                logger.info('%s: the mask is in the alpha channel, here and in others', path)
            return alpha
    return _image_pixels(picture, path, page)


def _is_white_zero(picture: Image.Image) -> bool:
    """Of a TIFF of numbers; 1-bit ones are read as they are shown."""
    return picture.format == 'TIFF' and picture.tag_v2.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO


def _is_deep(picture: Image.Image) -> bool:
    """Has a colour picture 16 bits a channel? PIL keeps the upper 8."""
    bits = picture.tag_v2.get(258, (8,)) if picture.format == 'TIFF' else ()
    return any(';16' in _rawmode(tile) for tile in picture.tile) or max(bits, default=8) > 8


def _rawmode(tile) -> str:
    return tile.args if isinstance(tile.args, str) else str(tile.args[0])


def _deep_colour(picture: Image.Image, path: Path, page: int) -> np.ndarray:
    """H W 3 uint16: decoded twice, the second time with the bytes of each value swapped, since
    PIL has no colour of 16 bits and keeps the byte that it takes for the upper one.
    """
    tiles = list(picture.tile)
    swap = {'B': 'L', 'L': 'B', 'N': 'B' if sys.byteorder == 'little' else 'L'}
    if not all(re.fullmatch('RGB[AX]?;16[BLN]', _rawmode(tile)) for tile in tiles):
        raise DataError(
            f'{path} has 16 bits a channel in an order that is not read '
            f'({_rawmode(tiles[0])}): save it as RGB without alpha, pixel by pixel, or with 8 bits'
        )

    def swapped(tile):
        raw = _rawmode(tile)[:-1] + swap[_rawmode(tile)[-1]]
        return tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))

    _warn_of_fourth_band(picture, path)
    upper = np.array(picture)[..., :3].astype(np.uint16)
    with Image.open(path, formats=PIL_FORMATS) as again:
        if page:
            again.seek(page)
        again.tile = [swapped(tile) for tile in again.tile]
        return upper << 8 | np.array(again)[..., :3]


def _load_array(path: Path, labels: bool) -> Picture:
    with _reading(path, 'array'):
        # Mapped, so that a shape that the file is too short for is refused and not allocated.
        mapped = np.lib.format.open_memmap(path, mode='r')
        _check_size(path, mapped.shape, mapped.dtype.itemsize)
        values = np.array(mapped)
    if values.ndim == 2:
        values = values[None, ..., None]
    elif values.ndim == 3:
        values = values[..., None] if labels else values[None]
    if values.ndim != 4:
        allowed = 'D H W or H W' if labels else 'D H W C, H W C or H W'
        raise DataError(f'{path} has the shape {values.shape}: it must be {allowed}')
    return Picture(values, None, None, path)


def _load_nifti(path: Path, labels: bool) -> Picture:
    nibabel = _imported('nibabel', path)
    with _reading(path, 'NIfTI volume'):
        header = _nifti_header(path, nibabel)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        if dtype.kind not in 'iuf':
            raise DataError(f'{path} holds voxels of {dtype}: save grey values, a volume a channel')
        if len(shape) < 2 or any(n > 1 for n in (*shape[3:4], *shape[5:]) if len(shape) > 4):
            raise DataError(
                f'{path} has the dimensions {shape}: 3, or 4 with the channels last, are read'
            )
        _check_size(path, shape, 2 * dtype.itemsize + 4)  # as stored, turned, and as a number
        stored = path.stat().st_size * (GZIP_RATIO if _starts_gzip(path) else 1)
        if stored < int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise DataError(f'{path} is shorter than its dimensions {shape} say: copy it again')
        with _unzipped(path) as file:
            proxy = nibabel.arrayproxy.ArrayProxy(file, header, mmap=False)
            values, slope, intercept = proxy.get_unscaled(), proxy.slope, proxy.inter
        if (slope, intercept) != (1, 0):
            wide = np.float64 if labels else np.float32  # labels must come out whole
            values = np.multiply(values, wide(slope), dtype=wide)
            values += wide(intercept)
        values_XYZC = values.reshape(*(*shape, 1, 1)[:3], -1)
        space = header.get_xyzt_units()[0]
        unit = {'meter': 1e3, 'micron': 1e-3}.get(space, 1.0)  # in mm, which files leave out
        return _turned(values_XYZC, header.get_best_affine(), header, unit, path)


def _nifti_header(path: Path, nibabel):
    """nibabel's header, without extensions: what is behind it in a file may be of any size."""
    with _unzipped(path) as file:
        block = file.read(540)
    second = 540 in (int.from_bytes(block[:4], order) for order in ('little', 'big'))
    kind = nibabel.Nifti2Header if second else nibabel.Nifti1Header
    header = kind(block[: 540 if second else 348])
    if header.get_data_offset() > MAX_EXTENSIONS:
        raise DataError(
            f'{path} has its voxels behind byte {header.get_data_offset()}, the limit is '
            f'{MAX_EXTENSIONS}: remove its extensions'
        )
    return header


def _load_dicom(files: Sequence[Path], source: Path, labels: bool) -> Picture:
    """A single file, or files that are the slices of one series."""
    pydicom = _imported('pydicom', source)
    slices, others = [], {}
    for path in files:
        with _reading(path, 'DICOM file'):
            header = _dicom_header(path, pydicom)
            if what := _no_picture(header):
                others[path] = what
            else:
                slices.append((path, header))
    if not slices:
        path, what = next(iter(others.items()))
        remedy = DICOM_TOOLS.get(what, 'leave it out')
        raise DataError(f'{path} is DICOM of the kind {what}, which holds no picture: {remedy}')
    if others:
        logger.info('%s: passed over, as they hold no slice: %s', source, _named(others))
    for path, header in slices:
        with _reading(path, 'DICOM file'):
            _check_dicom(header, path, pydicom)
    with _reading(source, 'DICOM series'):
        series = {str(header.get('SeriesInstanceUID', '')) for _, header in slices}
        if len(slices) > 1 and not any(header.get(PLACE[0]) for _, header in slices):
            raise DataError(
                f'{source} holds DICOM files without position, which are no series: give each file'
            )
        if len(series) > 1:
            raise DataError(f'{source} holds {len(series)} DICOM series: give each its own folder')
        order, affine, spacing = _dicom_geometry(slices, source)
    image = None
    for d, i in enumerate(order):
        path, header = slices[i]
        with _reading(path, 'DICOM file'):
            size = (header.Rows, header.Columns, header.get('SamplesPerPixel', 1))
            _check_size(path, (len(slices), *size), 0)
            if math.prod(size) > max(SMALL, PICTURE_RATIO * path.stat().st_size):
                raise DataError(f'{path} is too short for its {size} values: copy it again')
            if image is None:  # as it is stored, and turned
                check_room(source, 8 * len(slices) * math.prod(size))
            pixels = _dicom_pixels(path, pydicom, labels)
            if image is None:
                image = np.empty((len(slices), *pixels.shape), pixels.dtype)
            if pixels.shape != image.shape[1:]:
                raise DataError(
                    f'{path} is {pixels.shape}, {slices[order[0]][0]} {image.shape[1:]}: '
                    'the slices of a series are of one size'
                )
            # Each slice may have its own slope, so a later one may need another kind of number.
            image = image.astype(np.result_type(image, pixels), copy=False)
            image[d] = pixels
    if affine is None:
        return Picture(image, spacing, None, source)
    with _reading(source, 'DICOM series'):
        return _turned(image.transpose(2, 1, 0, 3), affine, None, 1.0, source)


def _dicom_syntax(path: Path, pydicom) -> str:
    """Its transfer syntax, '' where it does not say."""
    return pydicom.filereader.read_file_meta_info(path).get('TransferSyntaxUID', '')


def _dicom_header(path: Path, pydicom):
    if _dicom_syntax(path, pydicom) == DEFLATED:
        raise DataError(f'{path} is deflated as a whole: save it as explicit VR little endian')
    return pydicom.dcmread(path, stop_before_pixels=True)


def _no_picture(header) -> str:
    """What DICOM is that holds no picture of a patient: 'RTSTRUCT', 'SR' and on; else ''."""
    modality = str(header.get('Modality', ''))
    if header.get('Rows') and modality not in ('SEG', 'RTDOSE'):
        return ''
    uid = header.get('SOPClassUID') or header.file_meta.get('MediaStorageSOPClassUID', '')
    return modality or str(getattr(uid, 'name', uid)) or 'unknown'


def _check_dicom(header, path: Path, pydicom) -> None:
    """Raise DataError for pictures that are not read, and where a decoder is missing."""
    if int(header.get('NumberOfFrames', None) or 1) > 1:
        raise DataError(f'{path} has several frames: convert it to NIfTI, for instance by dcm2niix')
    if header.get('PhotometricInterpretation') == 'PALETTE COLOR':
        raise DataError(f'{path} has a palette: convert it to RGB or PNG')
    syntax = header.file_meta.get('TransferSyntaxUID', '')
    if not syntax or not syntax.is_transfer_syntax or not syntax.is_compressed:
        return
    try:
        there = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError as error:
        raise DataError(
            f'{path} is packed as {syntax.name}, which is not read: unpack it, for instance by '
            'gdcmconv --raw'
        ) from error
    if not there:
        raise DataError(f'{path} is packed as {syntax.name}: to read it, {_dicom_plugin(syntax)}')


def _dicom_plugin(syntax) -> str:
    """What to install for the decoding of a transfer syntax, by pydicom's own list."""
    plugin = 'openjpeg' if re.search('2000|HTJ2K|High-Throughput', syntax.name) else 'libjpeg'
    return f'pip install pylibjpeg pylibjpeg-{plugin}'


def _dicom_pixels(path: Path, pydicom, labels: bool) -> np.ndarray:
    """H W C. Images with the modality's own scale (CT: Hounsfield units), higher is brighter."""
    data = pydicom.dcmread(path)
    try:
        pixels = pydicom.pixels.pixel_array(data)
    except Exception as error:  # of each decoder its own
        syntax = data.file_meta.TransferSyntaxUID
        missing = importlib.util.find_spec('pylibjpeg') is None
        if not (missing and syntax.is_compressed and 'JPEG' in syntax.name):
            raise
        raise DataError(
            f'{path} can not be unpacked ({first_line(error)}): {_dicom_plugin(syntax)}, '
            'and copy it again if that does not read it either'
        ) from error
    if not labels:
        if data.get('PhotometricInterpretation') == 'MONOCHROME1':  # stored as a negative
            pixels = ~pixels if pixels.dtype.kind == 'i' else 2**data.BitsStored - 1 - pixels
        scaled = pydicom.pixels.apply_modality_lut(pixels, data)
        pixels = scaled.astype(np.float32) if scaled.dtype.kind == 'f' else scaled
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _dicom_geometry(slices, source: Path):
    """(order of the slices, affine of column, row and slice or None, spacing or None)."""
    first = slices[0][1]
    across = first.get('PixelSpacing') or first.get('ImagerPixelSpacing')
    placed = [header.get('ImagePositionPatient') for _, header in slices]
    turned = [header.get('ImageOrientationPatient') for _, header in slices]
    if not across or None in placed or None in turned:
        if len(slices) > 1:
            raise DataError(f'{source}: DICOM files without position are no series: give one file')
        return [0], None, (1.0, *map(float, across)) if across else None
    if not np.allclose(np.array(turned, float), np.array(turned[0], float), atol=1e-3):
        raise DataError(f'{source}: the slices lie at different angles (localizers?): sort them')
    along_row, along_column = np.array(turned[0], float).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    positions = np.array(placed, float)
    order = np.argsort(positions @ normal, kind='stable')
    steps = np.diff(positions[order] @ normal)
    if len(steps) and (steps < 1e-3).any():
        i, j = order[np.argmin(steps)], order[np.argmin(steps) + 1]
        raise DataError(
            f'{slices[i][0]} and {slices[j][0]} lie at the same place: keep one volume a folder'
        )
    if len(steps) and steps.max() > steps.min() + 0.1 * np.median(steps):
        i, j = order[np.argmax(steps)], order[np.argmax(steps) + 1]
        raise DataError(
            f'{source} lacks a slice between {slices[i][0].name} and {slices[j][0].name}: '
            f'steps of {steps.min():.3g} to {steps.max():.3g} mm'
        )
    if len(steps):
        step = (positions[order[-1]] - positions[order[0]]) / len(steps)
    else:
        step = normal * float(first.get('SpacingBetweenSlices') or first.get('SliceThickness') or 1)
    row_step, column_step = map(float, across)
    affine_lps = np.eye(4)
    affine_lps[:3] = np.stack(
        [along_row * column_step, along_column * row_step, step, positions[order[0]]], axis=1
    )
    return order.tolist(), LPS_TO_RAS @ affine_lps, None


# Orientation: quarter turns only.


def _turned(values_XYZC, affine, header, unit: float, path: Path) -> Picture:
    """The picture of a volume in the file's own axes."""
    nibabel = _imported('nibabel', path)
    shape = values_XYZC.shape[:3]
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f'{path} has an affine that spans no volume: set its sform or qform')
    there = nibabel.orientations.io_orientation(affine)
    towards = there[:, 0].astype(int)  # right, front or head: what each axis of the file goes along
    view = 'axial'
    if shape.count(1) == 1:
        view = ('sagittal', 'coronal', 'axial')[towards[shape.index(1)]]
    wanted = nibabel.orientations.axcodes2ornt(VIEWS[view])
    axes = tuple(int(np.flatnonzero(towards == line)[0]) for line in wanted[:, 0])
    flips = tuple(bool(there[axis, 1] != way) for axis, way in zip(axes, wanted[:, 1], strict=True))
    geometry = Geometry(affine, shape, axes, flips, header)
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(0)) * unit
    spacing = tuple(float(lengths[axis]) for axis in axes)
    return Picture(_turn(values_XYZC, geometry), spacing, geometry, path)


def _turn(values_XYZC: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The file's axes -> D H W C."""
    values = values_XYZC.transpose(*geometry.axes, 3)
    return np.ascontiguousarray(np.flip(values, np.flatnonzero(geometry.flips)))


def _turn_back(values_DHW: np.ndarray, geometry: Geometry) -> np.ndarray:
    """D H W -> the file's axes."""
    return np.flip(values_DHW, np.flatnonzero(geometry.flips)).transpose(np.argsort(geometry.axes))


def _turned_affine(geometry: Geometry) -> np.ndarray:
    """4x4: index of D, H, W -> position."""
    moves = np.zeros((4, 4))
    moves[3, 3] = 1
    for i, (axis, flip) in enumerate(zip(geometry.axes, geometry.flips, strict=True)):
        moves[axis, i] = -1 if flip else 1
        moves[axis, 3] = geometry.shape[axis] - 1 if flip else 0
    return geometry.affine @ moves


def _check_same_grid(one: Picture, other: Picture) -> None:
    """Same size, and the corners within a tenth of a voxel of one another."""
    both = f'{one.source} and {other.source}'
    placed = isinstance(one.geometry, Geometry) and isinstance(other.geometry, Geometry)
    if placed and one.geometry.shape == other.geometry.shape:
        for without, there in ((one, other), (other, one)):
            if _lacks_affine(without.geometry) and not _lacks_affine(there.geometry):
                raise DataError(
                    f'{without.source} does not say where it lies (its affine is the default), '
                    f'{there.source} does: if their voxels are the same, give it that affine: '
                    'python -c "import nibabel as n, numpy as np; '
                    f"a, b = map(n.load, ('{there.source}', '{without.source}')); "
                    'n.save(n.Nifti1Image(np.array(b.dataobj), a.affine), '
                    f"'{without.source}')\""
                )
    if one.image.shape[:3] != other.image.shape[:3]:
        sizes = ' and '.join('x'.join(map(str, p.image.shape[:3])) for p in (one, other))
        raise DataError(
            f'{both} are not of one size: {sizes} (slices, rows, columns){_exif_told(one, other)}'
        )
    spacings = [p.spacing for p in (one, other) if p.spacing]
    if len(spacings) == 2 and not np.allclose(*spacings, rtol=1e-2):
        raise DataError(f'{both} have voxels of {spacings[0]} and {spacings[1]} mm: resample one')
    if placed:
        ends = [[0, n - 1] for n in one.image.shape[:3]]
        corners = np.stack([*np.meshgrid(*ends), np.ones((2, 2, 2))]).reshape(4, 8)
        affines = _turned_affine(one.geometry), _turned_affine(other.geometry)
        apart = np.abs((affines[0] - affines[1]) @ corners).max()
        if apart > 0.1 * np.sqrt((affines[1][:3, :3] ** 2).sum(0)).min():
            raise DataError(
                f'{both} lie up to {apart:.3g} mm apart (their affines differ): '
                'resample one to the other'
            )


def _lacks_affine(geometry: Geometry) -> bool:
    """Whether a file says nothing of its place: what tools write that are given an array alone."""
    header = geometry.header
    if header is not None and not header['sform_code'] and not header['qform_code']:
        return True
    return np.array_equal(np.abs(geometry.affine), np.eye(4))


def _exif_told(one: Picture, other: Picture) -> str:
    """What to do where one of two pictures is turned by EXIF and the other is not."""
    for turned, still in ((one, other), (other, one)):
        turn = turn_by_exif(turned.source)
        swapped = turned.image.shape[1:3] == still.image.shape[2:0:-1]
        if turn in (5, 6, 7, 8) and swapped and turn_by_exif(still.source) == 1:
            return (
                f'; {turned.source.name} is turned by its EXIF orientation ({turn}), as viewers '
                f'show it, and {still.source.name} is not: remove the tag (exiftool -Orientation= '
                f'{turned.source}), or turn the other too'
            )
    return ''


# Numbers.


def _as_image(values: np.ndarray, path: Path) -> np.ndarray:
    """uint8, uint16 or float32, the values unchanged where these hold them."""
    _check_not_empty(values, path)
    if values.dtype.kind in 'iu':
        if values.dtype.itemsize <= 2 and values.dtype.kind == 'u':
            return values.astype(values.dtype.newbyteorder('='), copy=False)
        whole = values.min() >= 0 and values.max() < 2**16
        return values.astype(np.uint16 if whole else np.float32)
    if values.dtype.kind == 'b':
        return values.astype(np.uint8)
    if values.dtype.kind != 'f':
        raise DataError(f'{path} holds {values.dtype}: whole or real numbers are read')
    with np.errstate(over='ignore'):  # beyond float32 is infinite, which is dealt with below
        values = values.astype(np.float32, copy=False)
    finite = np.isfinite(values)
    if not finite.all():
        if not finite.any():
            raise DataError(f'{path} holds no number at all, only NaN or infinity: make it again')
        logger.warning('%s: %d values that are no number are set to 0', path, (~finite).sum())
        values = np.where(finite, values, np.float32(0))
    return values


def _as_labels(values: np.ndarray, path: str | Path) -> np.ndarray:
    """The smallest of uint8, uint16, int32 and int64 that holds them. Raises DataError."""
    _check_not_empty(values, path)
    if values.dtype.kind not in 'biuf':
        raise DataError(f'{path} holds {values.dtype}: labels are whole numbers')
    if values.dtype.kind == 'f':
        whole = np.rint(values)
        with np.errstate(invalid='ignore', over='ignore'):
            wrong = ~(np.abs(values - whole) < 1e-4) | (np.abs(whole) > 2**31)
        if wrong.any():
            raise DataError(
                f'{path} holds {values[wrong].flat[0]:.6g}, labels are whole numbers: was it '
                'resampled or is it a map of probabilities?'
            )
        values = whole
    low, high = values.min(), values.max()
    for kind in (np.uint8, np.uint16, np.int32, np.int64):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind, copy=False)
    raise DataError(f'{path} holds labels from {low} to {high}: number them from 0')


def _check_not_empty(values: np.ndarray, path: str | Path) -> None:
    if not values.size:
        raise DataError(f'{path} has no pixel (its shape is {values.shape}): make it again')


def _check_size(path: Path, shape: Sequence[int], each: int) -> None:
    """Raise DataError for what is too much to hold, at `each` bytes a value, before it is read."""
    words = ' x '.join(map(str, shape))
    if any(int(n) < 1 for n in shape):
        raise DataError(f'{path} says its size is {words}, which is no size: copy it again')
    values = int(np.prod([int(n) for n in shape], dtype=object))
    if values > MAX_VALUES:
        raise DataError(
            f'{path} says its size is {words}, the limit is {MAX_VALUES} values: cut it up'
        )
    check_room(path, values * each)


def check_room(path: object, needed: int) -> None:
    """Raise NoRoomError for what needs more bytes than are free."""
    if needed > SMALL and needed > (free := free_memory()):
        raise NoRoomError(
            f'{path} needs {needed / 2**20:.0f} MB and {free / 2**20:.0f} MB are free: '
            'close other programs or cut it up'
        )


# Files.


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Decoders raise whatever a damaged file leads them to: it becomes one DataError."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise NoRoomError(f'{path} needs more memory than is free: cut it up') from error
    except Exception as error:
        remedy = 'copy it again'
        if isinstance(error, UnidentifiedImageError) and os.path.getsize(path):
            remedy += ', or save it as PNG: its content is none of ' + ', '.join(PIL_FORMATS)
        reason = first_line(error)
        raise DataError(f'{path} is not a readable {kind} ({reason}): {remedy}') from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end; after an error nothing is left.

    It has a name of its own, so that two processes may write the same `path`; `sweep` removes those
    of processes that were killed.
    """
    aside = path.with_name(f'.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise DataError(not_written(path, error)) from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Remove what `writing` left below a folder when its process was killed on this machine."""
    for path in folder.rglob(f'.{_HOST}.*.*.tmp'):
        try:
            os.kill(int(path.name.split('.')[2]), 0)
        except (ProcessLookupError, ValueError, OverflowError):
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:  # another user's
            pass


def _write(path: Path, values_DHW: np.ndarray, like: Picture) -> None:
    path = path.expanduser()
    if values_DHW.shape != like.image.shape[:3]:
        raise DataError(
            f'{path}: results of {values_DHW.shape} for {like.source}, which has '
            f'{like.image.shape[:3]} (slices, rows, columns)'
        )
    suffix = output_suffix(like)
    if suffix and suffix.split('.')[1] != _suffix(path)[1:].split('.')[0]:
        raise DataError(f'{path} must end in {suffix}, as what is made from {like.source} does')
    if suffix == '':
        _write_slices(path, values_DHW, like.geometry.names)
    elif suffix in NIFTI:
        _write_nifti(path, values_DHW, like)
    else:
        with writing(path) as aside, open(aside, 'w+b') as file:
            if suffix == '.npy':
                np.save(file, values_DHW, allow_pickle=False)
            elif suffix == '.png':
                Image.fromarray(values_DHW[0]).save(file, 'png')
            else:
                pages = map(Image.fromarray, values_DHW)
                first = next(pages)
                first.save(
                    file, 'tiff', save_all=True, append_images=pages, compression='tiff_deflate'
                )


def _write_slices(folder: Path, values_DHW: np.ndarray, names: Sequence[str]) -> None:
    """Every slice is written aside before the first takes its name."""
    with contextlib.ExitStack() as all_or_none:
        for values_HW, name in zip(values_DHW, names, strict=True):
            path = folder / f'{stem(name)}.png'
            Image.fromarray(values_HW).save(all_or_none.enter_context(writing(path)), 'png')


def _write_nifti(path: Path, values_DHW: np.ndarray, like: Picture) -> None:
    nibabel = _imported('nibabel', path)
    geometry = like.geometry
    header = None if geometry.header is None else geometry.header.copy()
    second = isinstance(header, nibabel.Nifti2Header)
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    volume = kind(_turn_back(values_DHW, geometry), geometry.affine, header, dtype=values_DHW.dtype)
    volume.header.extensions.clear()  # they say what the image is
    volume.header['cal_min'] = volume.header['cal_max'] = 0  # its range of grey values
    if header is None:
        volume.header.set_xyzt_units('mm')
    with writing(path) as aside, open(aside, 'wb') as raw:
        if not _is_gzip(path):
            volume.to_stream(raw)
            return
        # Without name and time, so that the same labels are the same bytes.
        with gzip.GzipFile('', 'wb', compresslevel=1, fileobj=raw, mtime=0) as file:
            volume.to_stream(file)


def _suffix(path: str | Path) -> str:
    """The known ending, in small letters, or ''."""
    name = Path(path).name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), '')


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith('.gz')


def _starts_gzip(path: Path) -> bool:
    with open(path, 'rb') as file:
        return file.read(2) == b'\x1f\x8b'


def _unzipped(path: Path) -> BinaryIO:
    """By what the file starts with: some tools write .nii.gz that are not packed."""
    return gzip.open(path) if _starts_gzip(path) else open(path, 'rb')


def _says_dicom(path: Path) -> bool:
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        return file.read(132)[128:] == b'DICM'
    return False


def _numbers_in_order(path: Path) -> list:
    """A key by which slice_2 comes before slice_10."""
    parts = re.split(r'(\d+)', path.name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _imported(name: str, path: Path):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f'{path} needs {name}: pip install "{PIP[name]}"') from error
