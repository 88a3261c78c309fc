"""NIfTI volumes by nibabel, in the file's own axes."""

import gzip
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pspnet_jax.data.formats import limits
from pspnet_jax.runtime.errors import DataError
from pspnet_jax.runtime.storage import writing

MAX_EXTENSIONS = 2**24  # bytes between a file's header and its voxels
GZIP_RATIO = 1032  # the highest ratio of deflate


def load(path: Path, labels: bool) -> tuple[np.ndarray, np.ndarray, Any, float]:
    """(X Y Z C, affine voxel -> position, nibabel's header, mm per unit)."""
    nibabel = limits.imported('nibabel', path)
    with limits.reading(path, 'NIfTI volume'):
        with open(path, 'rb') as file:
            packed = file.read(2) == b'\x1f\x8b'  # some tools write .nii.gz that are not gzipped
        header = _header(path, packed, nibabel)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        if dtype.kind not in 'iuf':
            raise DataError(
                f'{path} holds voxels of {dtype}: save grey values, one volume per channel'
            )
        if len(shape) < 2 or any(n > 1 for n in (*shape[3:4], *shape[5:]) if len(shape) > 4):
            raise DataError(
                f'{path} has dimensions {shape}: it must have 3, or 4 with channels last'
            )
        limits.check_size(path, shape, 2 * dtype.itemsize + 4)  # stored, rotated, converted
        stored = path.stat().st_size * (GZIP_RATIO if packed else 1)
        if stored < math.prod(map(int, shape)) * dtype.itemsize:
            raise DataError(f'{path} is too short for its dimensions {shape}: copy it again')
        with _unpacked(path, packed) as file:
            proxy = nibabel.arrayproxy.ArrayProxy(file, header, mmap=False)
            values, slope, intercept = proxy.get_unscaled(), proxy.slope, proxy.inter
        if (slope, intercept) != (1, 0):
            wide = np.float64 if labels else np.float32  # labels must stay whole
            values = np.multiply(values, wide(slope), dtype=wide)
            values += wide(intercept)
        unit = {'meter': 1e3, 'micron': 1e-3}.get(header.get_xyzt_units()[0], 1.0)  # default: mm
        values_XYZC = values.reshape(*(*shape, 1, 1)[:3], -1)
        return values_XYZC, header.get_best_affine(), header, unit


def _unpacked(path: Path, packed: bool) -> BinaryIO:
    return gzip.open(path) if packed else open(path, 'rb')


def _header(path: Path, packed: bool, nibabel):
    """nibabel's header without extensions, which may have any size."""
    with _unpacked(path, packed) as file:
        block = file.read(540)
    second = 540 in (int.from_bytes(block[:4], order) for order in ('little', 'big'))
    kind = nibabel.Nifti2Header if second else nibabel.Nifti1Header
    header = kind(block[: 540 if second else 348])
    if header.get_data_offset() > MAX_EXTENSIONS:
        raise DataError(
            f"{path}'s voxels start at byte {header.get_data_offset()}, but the limit is "
            f'{MAX_EXTENSIONS}: remove its extensions'
        )
    return header


def save(path: Path, values_XYZ: np.ndarray, affine: np.ndarray, header: Any) -> None:
    """Write a volume with the image's header, or with None in mm; .gz is compressed."""
    nibabel = limits.imported('nibabel', path)
    second = isinstance(header, nibabel.Nifti2Header)
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    copy = None if header is None else header.copy()
    volume = kind(values_XYZ, affine, copy, dtype=values_XYZ.dtype)
    volume.header.extensions.clear()  # they describe the image
    volume.header['cal_min'] = volume.header['cal_max'] = 0  # the image's range of grey values
    if header is None:
        volume.header.set_xyzt_units('mm')
    with writing(path) as aside, open(aside, 'wb') as raw:
        if path.suffix.lower() != '.gz':
            volume.to_stream(raw)
            return
        # Without name and time, so that the same labels give the same bytes.
        with gzip.GzipFile('', 'wb', compresslevel=1, fileobj=raw, mtime=0) as file:
            volume.to_stream(file)
