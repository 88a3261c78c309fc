"""Every picture and volume format in; label volumes and probabilities out, in the geometry of
their input.

Flat pictures (png, jpg, bmp, tif, webp; 8 and 16 bit; grey, palette, RGB, RGBA) keep their grid,
upright as viewers show it.
Volumes with a position in space (NIfTI, DICOM series) are turned by quarters, never resampled,
into one orientation, that in which radiologists look at them: slices from the feet to the head,
rows from front to back, columns from the patient's right to the left. A volume of a single
coronal or sagittal slice is that slice, head up. `Geometry` remembers how to turn back.

Files are not trusted: what a file says of its size is checked before it is allocated (`limits`),
nothing is unpickled, and whatever is wrong becomes one DataError.
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

# The directions in which slices, rows and columns go: sagittal, coronal and axial.
VIEWS = ('LIP', 'PIL', 'SPL')


class Geometry(NamedTuple):
    """Where a volume lies in space, and how its file's axes became D, H, W."""

    affine: np.ndarray  # 4x4: voxel of the file -> position, towards right, front, head
    shape: tuple[int, int, int]  # of the file
    turn: np.ndarray  # nibabel's orientation transform of the file's axes to D, H, W
    back: np.ndarray  # and the other way
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
    picture = _load(Path(path).expanduser(), labels=False)
    return picture._replace(image=_as_image(picture.image, picture.source))


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
    elif labels.shape[-1] != 3 or suffix(path) in NIFTI:
        many = labels.shape[-1]
        raise DataError(f'{path} has {many} values a voxel, a mask has one: save labels alone')
    if like is not None:
        _check_same_grid(mask._replace(image=labels), like)
    return labels


def read_palette(path: str | Path) -> np.ndarray | None:
    """D H W 3 uint8: what `read_labels` gives, in the colours that a palette shows; None of masks
    that have none. Raises DataError.
    """
    path = Path(path).expanduser()
    return flat.palette(path) if suffix(path) in PICTURES and path.is_file() else None


def stack(pictures: Sequence[Picture]) -> Picture:
    """One picture of the channels of several (the sequences of an MRI), in their order.

    Raises DataError where size, spacing or place in space differ.
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
    """The ending of what is written for a picture: .nii.gz, .nii, .tif, .npy, .png; '' for a
    folder of slices, whose masks are a folder.
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
    """Write whole numbers on the grid of `like`'s file; `path` ends as `output_suffix` says.

    NIfTI and DICOM: a NIfTI volume of the input's shape, orientation and affine. Pages: a TIFF of
    as many. Flat: a PNG of 8 bits, or 16 where a label is above 255; for a folder of slices a
    folder of PNGs with their names. `palette`, (256, 3) uint8, is what PNGs of 8 bits show the
    numbers in: their pixels are still the numbers. Raises DataError; then nothing is left of the
    file.
    """
    placed = isinstance(like.geometry, Geometry)
    kinds = (np.uint8, np.int16, np.int32) if placed else (np.uint8, np.uint16)
    _write(Path(path), _smallest(_as_labels(labels_DHW, path), kinds, path), like, palette)


def write_probabilities(path: str | Path, prob_DHW: np.ndarray, like: Picture) -> None:
    """Write one class' probabilities, 0 to 1, where `write_labels` writes labels.

    float32; in a PNG 16 bits, where 65535 stands for 1. Raises DataError.
    """
    if output_suffix(like) in ('.png', ''):
        prob_DHW = np.rint(np.clip(prob_DHW, 0, 1) * 65535).astype(np.uint16)
    else:
        prob_DHW = prob_DHW.astype(np.float32)
    _write(Path(path), prob_DHW, like)


# What is in a file: a Picture whose image D H W C still has the file's own kind of numbers.


def _load(path: Path, labels: bool) -> Picture:
    if os.path.isdir(path):
        return _load_folder(path, labels)
    if not os.path.isfile(path):
        raise DataError(f'{path} is not there: give a picture, a volume or a folder of slices')
    kind = suffix(path)
    if kind in NIFTI:
        return _turned(*nifti.load(path, labels), path)
    if kind == '.npy':
        return Picture(_load_array(path, labels), None, None, path)
    if kind in PICTURES:
        return Picture(flat.load([path], labels), None, None, path)
    if kind in DICOM or files.says_dicom(path):
        return _load_dicom([path], path, labels)
    raise DataError(f'{path} is of no known kind: the endings known are {", ".join(SUFFIXES)}')


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
        # Mapped, so that a shape that the file is too short for is refused and not allocated.
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
    """The picture of a volume in the file's own axes."""
    nibabel = limits.imported('nibabel', path).orientations
    shape = values_XYZC.shape[:3]
    axes = affine[:3, :3]
    with np.errstate(over='ignore'):
        sound = np.isfinite(affine).all() and np.isfinite(axes**2).all()
    if not sound or abs(np.linalg.det(axes)) < 1e-12:
        raise DataError(f'{path} has an affine that spans no volume: set its sform or qform')
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
    unsaid = header is not None and not header['sform_code'] and not header['qform_code']
    return unsaid or np.array_equal(np.abs(geometry.affine), np.eye(4))


def _exif_told(one: Picture, other: Picture) -> str:
    """What to do where one of two pictures is turned by EXIF and the other is not."""
    for turned, still in ((one, other), (other, one)):
        turn = flat.turn_by_exif(turned.source)
        swapped = turned.image.shape[1:3] == still.image.shape[2:0:-1]
        if turn in (5, 6, 7, 8) and swapped and flat.turn_by_exif(still.source) == 1:
            return (
                f'; {turned.source.name} is turned by its EXIF orientation ({turn}), as viewers '
                f'show it, and {still.source.name} is not: remove the tag (exiftool -Orientation= '
                f'{turned.source}), or turn the other too'
            )
    return ''


# Numbers.


def _as_image(values: np.ndarray, path: Path) -> np.ndarray:
    """uint8, uint16 or float32, the values unchanged where these hold them."""
    _check_kind(values, path)
    if values.dtype.kind == 'b':
        return values.astype(np.uint8)
    if values.dtype.kind == 'u' and values.dtype.itemsize <= 2:
        return values.astype(values.dtype.newbyteorder('='), copy=False)
    if values.dtype.kind in 'iu':
        whole = values.min() >= 0 and values.max() < 2**16
        return values.astype(np.uint16 if whole else np.float32)
    with np.errstate(over='ignore'):  # beyond float32 is infinite, which is dealt with below
        values = values.astype(np.float32, copy=False)
    finite = np.isfinite(values)
    if not finite.any():
        raise DataError(f'{path} holds no number at all, only NaN or infinity: make it again')
    if not finite.all():
        logger.warning('%s: %d values that are no number are set to 0', path, (~finite).sum())
        values = np.where(finite, values, np.float32(0))
    return values


def _as_labels(values: np.ndarray, path: str | Path) -> np.ndarray:
    """The smallest of uint8, uint16, int32 and int64 that holds them. Raises DataError."""
    _check_kind(values, path)
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
    return _smallest(values, (np.uint8, np.uint16, np.int32, np.int64), path)


def _smallest(labels: np.ndarray, kinds: Sequence[type], path: str | Path) -> np.ndarray:
    """The same labels as the first kind of number that holds them. Raises DataError."""
    low, high = labels.min(), labels.max()
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return labels.astype(kind, copy=False)
    raise DataError(f'{path}: labels from {low} to {high} do not fit {np.dtype(kinds[-1]).name}')


def _check_kind(values: np.ndarray, path: str | Path) -> None:
    if not values.size:
        raise DataError(f'{path} has no pixel (its shape is {values.shape}): make it again')
    if values.dtype.kind not in 'biuf':
        raise DataError(f'{path} holds {values.dtype}: whole or real numbers are read')


# Writing.


def _write(
    path: Path, values_DHW: np.ndarray, like: Picture, palette: np.ndarray | None = None
) -> None:
    path = path.expanduser()
    if values_DHW.shape != like.image.shape[:3]:
        raise DataError(
            f'{path}: results of {values_DHW.shape} for {like.source}, which has '
            f'{like.image.shape[:3]} (slices, rows, columns)'
        )
    ending = output_suffix(like)
    if ending and ending.split('.')[1] != suffix(path)[1:].split('.')[0]:
        raise DataError(f'{path} must end in {ending}, as what is made from {like.source} does')
    if isinstance(geometry := like.geometry, Geometry):
        values_XYZ = limits.imported('nibabel', path).apply_orientation(values_DHW, geometry.back)
        nifti.save(path, values_XYZ, geometry.affine, geometry.header)
        return
    # Every slice of a folder is written aside before the first takes its name.
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
