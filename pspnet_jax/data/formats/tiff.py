"""TIFFs: counts their pages, and reads by tifffile those that Pillow can't read correctly.

Pillow reads pages of one or three samples. It would read the channels that ImageJ and OME store as
pages as slices, it drops a fourth band, and it does not know many bands, some compressions and some
numbers of 16 or 64 bits.
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
# none, LZW, deflate (twice), PackBits, LZMA, Zstandard; others decompress to an unknown size.
UNPACKED = (1, 5, 8, 32946, 32773, 34925, 50000)


def count_pages(path: Path) -> int:
    """Count pages by their directories, as Pillow does; 0 if it is not a TIFF.

    Entries are not read: overlapping directories could make a file of 1 MB take hours.
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
        while place and place not in seen:  # stop at a cycle
            seen.add(place)
            file.seek(place)
            entries = of_entry * int.from_bytes(file.read(of_count), order)
            used += entries
            limits.check_slices(path, len(seen))
            if used > size:
                raise DataError(f'{path} has overlapping pages: copy it again')
            file.seek(entries, os.SEEK_CUR)
            place = int.from_bytes(file.read(of_place), order)
    return len(seen)


def beyond_pillow(path: Path, pages: int, labels: bool) -> str:
    """Why Pillow can't read this TIFF correctly; '' if it can.

    For a mask, Pillow's three bands are enough.
    """
    try:
        with Image.open(path, formats=('TIFF',)) as picture:
            tags, bands = picture.tag_v2, len(picture.getbands())
    except (UnidentifiedImageError, KeyError):  # KeyError for an unknown compression
        return _unknown(path)
    samples = tags.get(SAMPLES, 1)
    if not labels and samples > bands and tags.get(PHOTOMETRIC) in (0, 1, 2):
        return f'has {samples} bands'
    return _named_axes(str(tags.get(DESCRIPTION, '')), pages, samples)


def _unknown(path: Path) -> str:
    """What Pillow does not support in the file; '' if it is not a TIFF."""
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
    """The axes in ImageJ's, OME's or tifffile's notes, if pages may be other than slices."""
    if description.startswith('ImageJ='):
        lines = re.findall(r'^(images|channels|slices|frames)=(\d{1,9})\s*$', description, re.M)
        sizes = {name: int(number) for name, number in lines}
        images = sizes.pop('images', 1)  # beyond 4 GB there is one directory for all
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
    """D H W C of a TIFF that Pillow can't read; its metadata names the channels."""
    reading = f'{path} {why}: reading it'
    tifffile = limits.imported('tifffile', reading)
    with tifffile.TiffFile(path, _multifile=False) as file:  # do not open files that it names
        first, *others = file.series
        if first.keyframe.compression not in UNPACKED:
            raise DataError(
                f'{path} {why}: save it uncompressed, for instance by tifffile and imagecodecs: '
                "python -c \"import tifffile as t; t.imwrite('NEW.tif', t.imread('OLD.tif'))\""
            )
        if first.keyframe.compression != 1:
            limits.imported('imagecodecs', reading)
        if file.is_ome and first.kind != 'ome':
            raise DataError(
                f'{path} has OME planes that are corrupted or in other files: export one file'
            )
        if any(not series.keyframe.is_reduced for series in others):
            raise DataError(f'{path} holds {1 + len(others)} images: save each as its own file')
        limits.check_size(path, first.shape, first.dtype.itemsize, path.stat().st_size)
        if any(page is None for page in first.pages):
            raise DataError(f'{path} lacks pages that its metadata names: export it again')
        values = arrange(first.asarray(maxworkers=1), first.axes, path)
        white_is_zero = first.keyframe.photometric == WHITE_IS_ZERO
    limits.check_slices(path, len(values))
    return brighter_is_higher(values, path) if white_is_zero and not labels else values


def brighter_is_higher(values: np.ndarray, path: Path) -> np.ndarray:
    """Invert an image that is stored as a negative, as viewers do; Pillow does it for 8 bits."""
    if values.dtype.kind != 'u':
        raise DataError(f'{path} stores white as 0 in {values.dtype}: save it with black as 0')
    return np.iinfo(values.dtype).max - values


def arrange(values: np.ndarray, axes: str, path: Path) -> np.ndarray:
    """Reorder to D H W C, with channels and samples last.

    Raises DataError if more than one of the other axes is longer than 1.
    """
    slices = [a for a, size in zip(axes, values.shape, strict=True) if size > 1 and a not in 'YXCS']
    if len(slices) > 1 or not {'Y', 'X'}.issubset(axes):
        raise DataError(
            f'{path} has the axes {axes} of {values.shape}, but only slices, rows, columns and '
            f'channels can be read: save each step of {slices[0] if slices else axes[0]} as a '
            'separate file'
        )
    leading = [i for i, axis in enumerate(axes) if axis not in 'YXCS']
    last = [i for i, axis in enumerate(axes) if axis in 'CS']
    size = values.shape[axes.index('Y')], values.shape[axes.index('X')]
    moved = values.transpose(*leading, axes.index('Y'), axes.index('X'), *last)
    return moved.reshape(math.prod(values.shape[i] for i in leading), *size, -1)
