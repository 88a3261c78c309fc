"""TIFFs: their pages, and by tifffile those that Pillow can not read or takes for something else.

Pillow gives pages of one or three samples. Channels that ImageJ and OME keep as pages would be
slices to it, a fourth band is dropped, and numbers of 16 or 64 bits, many bands and some
compressions are unknown to it.
"""

import math
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from pspnet_jax.data.formats import limits
from pspnet_jax.runtime.errors import DataError

BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION, SAMPLES, FORMAT = 258, 259, 262, 270, 277, 339
WHITE_IS_ZERO = 0  # of PHOTOMETRIC
# none, LZW, deflate (twice), PackBits, LZMA, Zstandard: the others unpack to an unknown size.
UNPACKED = (1, 5, 8, 32946, 32773, 34925, 50000)


def count_pages(path: Path) -> int:
    """Pages along their directories, as Pillow goes, but without reading the entries: directories
    that overlap make a file of 1 MB hours of work. 0 for what is no TIFF.
    """
    size = path.stat().st_size
    with open(path, 'rb') as file:
        head = file.read(16)
        if head[:4] not in TiffImagePlugin.PREFIXES:
            return 0
        order = 'little' if head[:2] == b'II' else 'big'
        of_count, of_entry, of_place = (8, 20, 8) if head[2] == 43 else (2, 12, 4)  # bytes
        place = int.from_bytes(head[of_place : 2 * of_place], order)
        seen, used = set(), 0
        while place and place not in seen:  # what leads back ends there
            seen.add(place)
            file.seek(place)
            entries = of_entry * int.from_bytes(file.read(of_count), order)
            used += entries
            limits.check_slices(path, len(seen))
            if used > size:
                raise DataError(f'{path} has pages that lie on one another: copy it again')
            file.seek(entries, os.SEEK_CUR)
            place = int.from_bytes(file.read(of_place), order)
    return len(seen)


def beyond_pillow(path: Path, pages: int, labels: bool) -> str:
    """Why this TIFF of so many pages is not Pillow's, in words; '' where it is.

    Of a mask's bands Pillow's three are enough.
    """
    try:
        with Image.open(path, formats=('TIFF',)) as picture:
            tags, bands = picture.tag_v2, len(picture.getbands())
    except (UnidentifiedImageError, KeyError):  # the latter of a compression that it lacks
        return _unknown(path)
    samples = tags.get(SAMPLES, 1)
    if not labels and samples > bands and tags.get(PHOTOMETRIC) in (0, 1, 2):
        return f'has {samples} bands'
    return _named_axes(str(tags.get(DESCRIPTION, '')), pages, samples)


def _unknown(path: Path) -> str:
    """What is unusual in a file that Pillow does not know; '' where it is no TIFF at all."""
    with open(path, 'rb') as file:
        head = file.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head + file.read(8 * (head[2] == 43)))
        file.seek(tags.next)
        tags.load(file)
    if not {256, 257, PHOTOMETRIC}.issubset(tags):
        return ''
    if (packed := tags.get(COMPRESSION, 1)) not in TiffImagePlugin.COMPRESSION_INFO:
        return f'is compressed in a way ({packed}) that Pillow does not know'
    bits = tags.get(BITS, (1,))
    return f'has {tags.get(SAMPLES, 1)} band(s) of {max(bits)} bits, which Pillow does not read'


def _named_axes(description: str, pages: int, samples: int) -> str:
    """Axes that ImageJ, OME or tifffile note, where pages may be other than slices, in words."""
    if description.startswith('ImageJ='):
        lines = re.findall(r'^(images|channels|slices|frames)=(\d{1,9})\s*$', description, re.M)
        sizes = {name: int(number) for name, number in lines}
        images = sizes.pop('images', 1)  # beyond 4 GB one directory is for all
        long = [name for name, number in sizes.items() if number > 1]
        odd = 'channels' in long or len(long) > 1 or images > pages
        return f'has pages of {", ".join(long) or images}' * odd
    if images := re.findall(r'<(?:\w+:)?Pixels\b[^>]*>', description):  # OME
        sizes = dict(re.findall(r'\bSize([CZT])="(\d{1,9})"', images[0]))
        c, z, t = (int(sizes.get(axis, 1)) for axis in 'CZT')
        if len(images) > 1 or c not in (1, samples) or (z > 1 and t > 1) or z * t != pages:
            return f'has OME axes (channels {c}, slices {z}, frames {t}, images {len(images)})'
        return ''
    noted = re.search(r'"axes": *"([A-Z]{2,9})"', description)
    if noted and ('C' in noted[1] or len(set(noted[1]) - set('YXS')) > 1):
        return f'has the axes {noted[1]}'
    return ''


def load(path: Path, why: str, labels: bool) -> np.ndarray:
    """D H W C of a TIFF that is not Pillow's; channels are those that its metadata names."""
    reading = f'{path} {why}: reading it'
    tifffile = limits.imported('tifffile', reading)
    with tifffile.TiffFile(path, _multifile=False) as file:  # others that it names are not opened
        first, *others = file.series
        if first.keyframe.compression not in UNPACKED:
            raise DataError(
                f'{path} {why}: save it uncompressed, for instance by tifffile and imagecodecs: '
                "python -c \"import tifffile as t; t.imwrite('NEW.tif', t.imread('OLD.tif'))\""
            )
        if first.keyframe.compression != 1:
            limits.imported('imagecodecs', reading)
        if file.is_ome and first.kind != 'ome':
            raise DataError(f'{path} has OME planes in other files, or damaged: export it as one')
        if any(not series.keyframe.is_reduced for series in others):
            raise DataError(f'{path} holds {1 + len(others)} images: save each as a file')
        limits.check_size(path, first.shape, first.dtype.itemsize, path.stat().st_size)
        if any(page is None for page in first.pages):
            raise DataError(f'{path} lacks pages that its metadata names: export it again')
        values = arrange(first.asarray(maxworkers=1), first.axes, path)
        white_is_zero = first.keyframe.photometric == WHITE_IS_ZERO
    limits.check_slices(path, len(values))
    return brighter_is_higher(values, path) if white_is_zero and not labels else values


def brighter_is_higher(values: np.ndarray, path: Path) -> np.ndarray:
    """Of an image that is stored as a negative, what viewers show; Pillow does it at 8 bits."""
    if values.dtype.kind != 'u':
        raise DataError(f'{path} stores white as 0 in {values.dtype}: save it with black as 0')
    return np.iinfo(values.dtype).max - values


def arrange(values: np.ndarray, axes: str, path: Path) -> np.ndarray:
    """D H W C: channels and samples last, and of the other axes one at most longer than 1.

    Raises DataError.
    """
    slices = [a for a, size in zip(axes, values.shape, strict=True) if size > 1 and a not in 'YXCS']
    if len(slices) > 1 or not {'Y', 'X'}.issubset(axes):
        raise DataError(
            f'{path} has the axes {axes} of {values.shape}: slices, rows, columns and channels are '
            f'read; save each step of {slices[0] if slices else axes[0]} as a file of its own'
        )
    leading = [i for i, axis in enumerate(axes) if axis not in 'YXCS']
    last = [i for i, axis in enumerate(axes) if axis in 'CS']
    size = values.shape[axes.index('Y')], values.shape[axes.index('X')]
    moved = values.transpose(*leading, axes.index('Y'), axes.index('X'), *last)
    return moved.reshape(math.prod(values.shape[i] for i in leading), *size, -1)
