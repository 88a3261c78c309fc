"""Reads images and volumes; writes labels and probabilities in the geometry of the input.

2D images (png, jpg, bmp, tif, webp; 8 and 16 bit; grey, palette, RGB, RGBA) keep their grid,
upright as viewers show it.
Volumes with a position in space (NIfTI, DICOM series) are rotated by quarter turns, never
resampled, into the orientation in which radiologists view them: slices from the feet to the head,
rows from front to back, columns from the patient's right to the left. A single coronal or sagittal
slice is shown with the head up. `Geometry` stores how to rotate back.

Files are not trusted: the size that a file claims is checked before it is allocated (`limits`),
nothing is unpickled, and every fault is a DataError.
"""

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pspnet_jax.data.formats import dicom, files, flat, limits, nifti
from pspnet_jax.data.formats.files import DICOM, NIFTI, PICTURES, SUFFIXES, suffix
from pspnet_jax.runtime.errors import DataError
from pspnet_jax.runtime.storage import writing

logger = logging.getLogger(__name__)

# Directions of slices, rows and columns in sagittal, coronal and axial views.
VIEWS = ('LIP', 'PIL', 'SPL')


class Geometry(NamedTuple):
    """Where a volume lies in space, and how its file's axes became D, H, W."""

    affine: np.ndarray  # 4x4: voxel in the file -> position (right, front, head)
    shape: tuple[int, int, int]  # of the file
    turn: np.ndarray  # nibabel's orientation transform of the file's axes to D, H, W
    back: np.ndarray  # and the other way
    header: Any = None  # nibabel's; None for DICOM


class SliceFiles(NamedTuple):
    """A folder of 2D images, in the order of the slices."""

    names: tuple[str, ...]


class Picture(NamedTuple):
    """image D H W C uint8, uint16 or float32; (slice, row, column) spacing in mm or None.

    `geometry` is None for 2D images, pages and arrays.
    """

    image: np.ndarray
    spacing: tuple[float, float, float] | None
    geometry: Geometry | SliceFiles | None
    source: Path


def read(path: str | Path) -> Picture:
    """Read an image or volume: a file, a folder of slices or a folder with a DICOM series.

    Grey gives C = 1; palette, RGB and RGBA give C = 3 (dropped alpha is logged); a TIFF gives its
    channels and bands, a 4-dimensional NIfTI its last axis. Negatives (TIFF, DICOM) are inverted,
    as in viewers. Whole numbers from 0 to 65535 stay whole; others become float32 with the file's
    slope and intercept applied. NaN and infinity become 0, which is logged. Arrays (.npy) are
    D H W C, H W C or H W. Raises DataError.
    """
    picture = _load(Path(path).expanduser(), labels=False)
    return picture._replace(image=_as_image(picture.image, picture.source))


def read_labels(path: str | Path, like: Picture | None = None) -> np.ndarray:
    """Read a mask as stored: D H W integers, or D H W 3 of an RGB mask.

    Palette images give their indices (`read_palette` gives the colours), 1-bit images 0 and 1, and
    images of a single colour their alpha. Volumes are rotated as in `read`. With `like`, the image
    of the mask, size and position must agree. Arrays (.npy) are D H W or H W. Raises DataError,
    also for values that are not whole.
    """
    path = Path(path).expanduser()
    mask = _load(path, labels=True)
    labels = _as_labels(mask.image, path)
    if labels.shape[-1] == 1:
        labels = labels[..., 0]
    elif labels.shape[-1] != 3 or suffix(path) in NIFTI:
        many = labels.shape[-1]
        raise DataError(f'{path} has {many} values a voxel, but a mask has one: save only labels')
    if like is not None:
        _check_same_grid(mask._replace(image=labels), like)
    return labels


def read_palette(path: str | Path) -> np.ndarray | None:
    """D H W 3 uint8: the mask of `read_labels` in its palette's colours; None without a palette.

    Raises DataError.
    """
    path = Path(path).expanduser()
    return flat.palette(path) if suffix(path) in PICTURES and path.is_file() else None


def stack(pictures: Sequence[Picture]) -> Picture:
    """Stack the channels of several pictures (such as the sequences of an MRI), in order.

    Raises DataError if size, spacing or position differ.
    """
    first, *others = pictures
    if not others:
        return first
    for other in others:
        _check_same_grid(other, first)
    dtype = np.result_type(*(picture.image.dtype for picture in pictures))
    size = sum(picture.image.size for picture in pictures)
    limits.check_size(first.source, (size,), dtype.itemsize)
    image = np.concatenate([picture.image for picture in pictures], axis=-1, dtype=dtype)
    return first._replace(image=image)


def output_suffix(like: Picture) -> str:
    """The ending of the results for a picture: .nii.gz, .nii, .tif, .npy, .png; '' for a folder of
    slices, whose results are a folder.
    """
    if isinstance(like.geometry, SliceFiles):
        return ''
    if isinstance(like.geometry, Geometry):
        return '.nii' if suffix(like.source) == '.nii' else '.nii.gz'
    if suffix(like.source) == '.npy':
        return '.npy'
    return '.tif' if len(like.image) > 1 else '.png'


def write_labels(
    path: str | Path, labels_DHW: np.ndarray, like: Picture, palette: np.ndarray | None = None
) -> None:
    """Write whole numbers on the grid of `like`'s file; `path` must end with `output_suffix`.

    NIfTI and DICOM give a NIfTI volume of the input's shape, orientation and affine; pages a TIFF
    of as many pages; a 2D image a PNG of 8 bits, or 16 bits for labels above 255; a folder of
    slices a folder of PNGs with the same names. `palette`, (256, 3) uint8, sets the colours of
    8-bit PNGs; their pixels are still the numbers. Raises DataError and then leaves no file.
    """
    placed = isinstance(like.geometry, Geometry)
    kinds = (np.uint8, np.int16, np.int32) if placed else (np.uint8, np.uint16)
    _write(Path(path), _smallest(_as_labels(labels_DHW, path), kinds, path), like, palette)


def write_probabilities(path: str | Path, prob_DHW: np.ndarray, like: Picture) -> None:
    """Write one class' probabilities, 0 to 1, in the same formats as `write_labels`.

    They are float32, or in a PNG 16 bits, where 65535 means 1. Raises DataError.
    """
    if output_suffix(like) in ('.png', ''):
        prob_DHW = np.rint(np.clip(prob_DHW, 0, 1) * 65535).astype(np.uint16)
    else:
        prob_DHW = prob_DHW.astype(np.float32)
    _write(Path(path), prob_DHW, like)


# Reading: a Picture whose image D H W C still has the file's own dtype.


def _load(path: Path, labels: bool) -> Picture:
    if os.path.isdir(path):
        return _load_folder(path, labels)
    if not os.path.isfile(path):
        raise DataError(f'{path} does not exist: give an image, a volume or a folder of slices')
    kind = suffix(path)
    if kind in NIFTI:
        return _turned(*nifti.load(path, labels), path)
    if kind == '.npy':
        return Picture(_load_array(path, labels), None, None, path)
    if kind in PICTURES:
        return Picture(flat.load([path], labels), None, None, path)
    if kind in DICOM or files.says_dicom(path):
        return _load_dicom([path], path, labels)
    raise DataError(f'{path} is of no known kind: the known endings are {", ".join(SUFFIXES)}')


def _load_folder(folder: Path, labels: bool) -> Picture:
    with limits.reading(folder, 'folder'):
        paths = [path for path in folder.iterdir() if path.is_file() and path.name[0] != '.']
    flats = [path for path in paths if suffix(path) in PICTURES]
    series = sorted(path for path in paths if files.is_dicom(path))
    if not flats and not series:
        raise DataError(f'{folder} holds neither slices ({", ".join(PICTURES)}) nor DICOM files')
    if flats and series:
        raise DataError(f'{folder} holds {flats[0].name} and {series[0].name}: keep one kind')
    limits.check_slices(folder, len(paths), 'files')
    if series:
        return _load_dicom(series, folder, labels)
    flats.sort(key=files.numbers_in_order)
    names = SliceFiles(tuple(path.name for path in flats))
    return Picture(flat.load(flats, labels), None, names, folder)


def _load_dicom(paths: Sequence[Path], source: Path, labels: bool) -> Picture:
    image, affine, spacing = dicom.load(paths, source, labels)
    if affine is None:
        return Picture(image, spacing, None, source)
    return _turned(image.transpose(2, 1, 0, 3), affine, None, 1.0, source)


def _load_array(path: Path, labels: bool) -> np.ndarray:
    with limits.reading(path, 'array'):
        # Mapped, so that a shape that is too large for the file is refused before allocation.
        mapped = np.lib.format.open_memmap(path, mode='r')
        limits.check_size(path, mapped.shape, mapped.dtype.itemsize)
        values = np.array(mapped)
    if values.ndim == 2 or (values.ndim == 3 and labels):
        values = values[..., None]
    if values.ndim == 3:
        values = values[None]
    if values.ndim != 4:
        allowed = 'D H W or H W' if labels else 'D H W C, H W C or H W'
        raise DataError(f'{path} has the shape {values.shape}: it must be {allowed}')
    return values


# Orientation: quarter turns only.


def _turned(values_XYZC, affine, header, unit: float, path: Path) -> Picture:
    """The Picture of a volume that is given in the file's own axes."""
    nibabel = limits.imported('nibabel', path).orientations
    shape = values_XYZC.shape[:3]
    axes = affine[:3, :3]
    with np.errstate(over='ignore'):
        sound = np.isfinite(affine).all() and np.isfinite(axes**2).all()
    if not sound or abs(np.linalg.det(axes)) < 1e-12:
        raise DataError(f'{path} has a singular affine: set its sform or qform')
    with limits.reading(path, 'volume'):
        there = nibabel.io_orientation(affine)
        flat_axis = there[shape.index(1), 0] if shape.count(1) == 1 else 2  # right, front or head
        wanted = nibabel.axcodes2ornt(VIEWS[int(flat_axis)])
        turn = nibabel.ornt_transform(there, wanted)
        values = np.ascontiguousarray(nibabel.apply_orientation(values_XYZC, turn))
    geometry = Geometry(affine, shape, turn, nibabel.ornt_transform(wanted, there), header)
    lengths = np.sqrt((_turned_affine(geometry)[:3, :3] ** 2).sum(0)) * unit
    return Picture(values, tuple(lengths.tolist()), geometry, path)


def _turned_affine(geometry: Geometry) -> np.ndarray:
    """4x4: index of D, H, W -> position."""
    from nibabel.orientations import inv_ornt_aff

    return geometry.affine @ inv_ornt_aff(geometry.turn, geometry.shape)


def _check_same_grid(one: Picture, other: Picture) -> None:
    """Raise DataError unless sizes agree and corners are within a tenth of a voxel."""
    both = f'{one.source} and {other.source}'
    placed = isinstance(one.geometry, Geometry) and isinstance(other.geometry, Geometry)
    if placed and one.geometry.shape == other.geometry.shape:
        for without, there in ((one, other), (other, one)):
            if _lacks_affine(without.geometry) and not _lacks_affine(there.geometry):
                raise DataError(
                    f'{without.source} has no position in space (its affine is the default), but '
                    f'{there.source} has one: if their voxels correspond, copy that affine: '
                    'python -c "import nibabel as n, numpy as np; '
                    f"a, b = map(n.load, ('{there.source}', '{without.source}')); "
                    'n.save(n.Nifti1Image(np.array(b.dataobj), a.affine), '
                    f"'{without.source}')\""
                )
    if one.image.shape[:3] != other.image.shape[:3]:
        sizes = ' and '.join('x'.join(map(str, p.image.shape[:3])) for p in (one, other))
        raise DataError(
            f'{both} have different sizes: {sizes} (slices, rows, columns){_exif_told(one, other)}'
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
    """Whether a file has no position, as when a tool wrote only an array."""
    header = geometry.header
    unsaid = header is not None and not header['sform_code'] and not header['qform_code']
    return unsaid or np.array_equal(np.abs(geometry.affine), np.eye(4))


def _exif_told(one: Picture, other: Picture) -> str:
    """What to do if EXIF rotates one of two images but not the other; else ''."""
    for turned, still in ((one, other), (other, one)):
        turn = flat.turn_by_exif(turned.source)
        swapped = turned.image.shape[1:3] == still.image.shape[2:0:-1]
        if turn in (5, 6, 7, 8) and swapped and flat.turn_by_exif(still.source) == 1:
            return (
                f'; {turned.source.name} is rotated by its EXIF orientation ({turn}), as viewers '
                f'show it, but {still.source.name} is not: remove the tag (exiftool -Orientation= '
                f'{turned.source}), or rotate the other too'
            )
    return ''


# Numbers.


def _as_image(values: np.ndarray, path: Path) -> np.ndarray:
    """Convert to uint8, uint16 or float32, without changing the values if possible."""
    _check_kind(values, path)
    if values.dtype.kind == 'b':
        return values.astype(np.uint8)
    if values.dtype.kind == 'u' and values.dtype.itemsize <= 2:
        return values.astype(values.dtype.newbyteorder('='), copy=False)
    if values.dtype.kind in 'iu':
        whole = values.min() >= 0 and values.max() < 2**16
        return values.astype(np.uint16 if whole else np.float32)
    with np.errstate(over='ignore'):  # overflow becomes infinity, which is handled below
        values = values.astype(np.float32, copy=False)
    finite = np.isfinite(values)
    if not finite.any():
        raise DataError(f'{path} holds only NaN or infinity: make it again')
    if not finite.all():
        logger.warning('%s: %d NaN or infinite values are set to 0', path, (~finite).sum())
        values = np.where(finite, values, np.float32(0))
    return values


def _as_labels(values: np.ndarray, path: str | Path) -> np.ndarray:
    """Convert to the smallest of uint8, uint16, int32 and int64. Raises DataError."""
    _check_kind(values, path)
    if values.dtype.kind == 'f':
        whole = np.rint(values)
        with np.errstate(invalid='ignore', over='ignore'):
            wrong = ~(np.abs(values - whole) < 1e-4) | (np.abs(whole) > 2**31)
        if wrong.any():
            raise DataError(
                f'{path} holds {values[wrong].flat[0]:.6g}, but labels are whole numbers: was it '
                'resampled, or is it a map of probabilities?'
            )
        values = whole
    return _smallest(values, (np.uint8, np.uint16, np.int32, np.int64), path)


def _smallest(labels: np.ndarray, kinds: Sequence[type], path: str | Path) -> np.ndarray:
    """The labels in the first of `kinds` that holds them. Raises DataError."""
    low, high = labels.min(), labels.max()
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return labels.astype(kind, copy=False)
    raise DataError(f'{path}: labels from {low} to {high} do not fit {np.dtype(kinds[-1]).name}')


def _check_kind(values: np.ndarray, path: str | Path) -> None:
    if not values.size:
        raise DataError(f'{path} has no pixels (its shape is {values.shape}): make it again')
    if values.dtype.kind not in 'biuf':
        raise DataError(f'{path} holds {values.dtype}: only whole and real numbers can be read')


# Writing.


def _write(
    path: Path, values_DHW: np.ndarray, like: Picture, palette: np.ndarray | None = None
) -> None:
    path = path.expanduser()
    if values_DHW.shape != like.image.shape[:3]:
        raise DataError(
            f'{path}: results have the size {values_DHW.shape}, but {like.source} has '
            f'{like.image.shape[:3]} (slices, rows, columns)'
        )
    ending = output_suffix(like)
    if ending and ending.split('.')[1] != suffix(path)[1:].split('.')[0]:
        raise DataError(f'{path} must end in {ending}, like all results of {like.source}')
    if isinstance(geometry := like.geometry, Geometry):
        values_XYZ = limits.imported('nibabel', path).apply_orientation(values_DHW, geometry.back)
        nifti.save(path, values_XYZ, geometry.affine, geometry.header)
        return
    # All slices of a folder are written to temporary files before the first is renamed.
    names = [f'{files.stem(name)}.png' for name in like.geometry.names] if not ending else ['']
    with contextlib.ExitStack() as all_or_none:
        for values_HW, name in zip(values_DHW, names, strict=False):
            aside = all_or_none.enter_context(writing(path / name))
            with open(aside, 'w+b') as file:
                if ending == '.npy':
                    np.save(file, values_DHW, allow_pickle=False)
                elif ending == '.tif':
                    pages = map(Image.fromarray, values_DHW)
                    options = {'save_all': True, 'append_images': pages}
                    next(pages).save(file, 'tiff', compression='tiff_deflate', **options)
                else:
                    picture = Image.fromarray(values_HW)
                    if palette is not None and picture.mode == 'L':
                        picture.putpalette(palette.tobytes())  # makes its mode 'P'
                    picture.save(file, 'png')
