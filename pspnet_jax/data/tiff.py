"""Which TIFFs Pillow can not read, or would take for something else: these are tifffile's.

Pillow gives pages of one or three samples. Channels that ImageJ and OME keep as pages would be
slices to it, a fourth band is dropped, and numbers of 16 or 64 bits, many bands and some
compressions are unknown to it.
"""

import math
import re
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from pspnet_jax.errors import DataError

BITS, COMPRESSION, PHOTOMETRIC, DESCRIPTION, SAMPLES, FORMAT = 258, 259, 262, 270, 277, 339
WHITE_IS_ZERO = 0  # of PHOTOMETRIC
# Those that unpack to a size that is known before: what others would need is not.
UNPACKED = {1: 'none', 5: 'LZW', 8: 'deflate', 32773: 'PackBits', 32946: 'deflate',
            34925: 'LZMA', 50000: 'Zstandard'}  # fmt: skip


def starts_tiff(path: Path) -> bool:
    with open(path, 'rb') as file:
        return file.read(4) in TiffImagePlugin.PREFIXES


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
    if axes := _other_axes(str(tags.get(DESCRIPTION, '')), pages, samples):
        return f'has {axes}'
    return ''


def is_unsigned(picture: Image.Image) -> bool:
    return picture.tag_v2.get(FORMAT, (1,))[0] == 1


def compression(path: Path) -> int:
    return int(_tags(path).get(COMPRESSION, 1))


def _tags(path: Path) -> TiffImagePlugin.ImageFileDirectory_v2:
    """Of the first page, whatever it is of."""
    with open(path, 'rb') as file:
        head = file.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head + file.read(8 * (head[2] == 43)))
        file.seek(tags.next)
        tags.load(file)
    return tags


def _unknown(path: Path) -> str:
    """What is unusual in a file that Pillow does not know; '' where it is no TIFF at all."""
    tags = _tags(path)
    if not {256, 257, PHOTOMETRIC}.issubset(tags):
        return ''
    packed = tags.get(COMPRESSION, 1)
    if packed not in TiffImagePlugin.COMPRESSION_INFO:
        return f'is compressed in a way ({packed}) that Pillow does not know'
    bits = tags.get(BITS, (1,))
    return f'has {tags.get(SAMPLES, 1)} band(s) of {max(bits)} bits, which Pillow does not read'


def _other_axes(description: str, pages: int, samples: int) -> str:
    """Axes that pages have beside slices, in words, as ImageJ, OME and tifffile note them."""
    if description.startswith('ImageJ='):
        lines = re.findall(r'^(images|channels|slices|frames)=(\d{1,9})\s*$', description, re.M)
        sizes = {name: int(number) for name, number in lines}
        several = [name for name in ('channels', 'slices', 'frames') if sizes.get(name, 1) > 1]
        hidden = sizes.get('images', 1) > pages  # beyond 4 GB there is one directory for all
        if 'channels' in several or len(several) > 1 or hidden:
            words = (f'{sizes[name]} {name}' for name in several or ['images'])
            return f'pages of {", ".join(words)}'
        return ''
    images = re.findall(r'<(?:\w+:)?Pixels\b[^>]*>', description)
    if images:  # OME
        sizes = dict(re.findall(r'\bSize([CZT])="(\d{1,9})"', images[0]))
        c, z, t = (int(sizes.get(axis, 1)) for axis in 'CZT')
        if len(images) > 1 or c not in (1, samples) or (z > 1 and t > 1) or z * t != pages:
            return f'OME axes (channels {c}, slices {z}, frames {t}, images {len(images)})'
        return ''
    noted = re.search(r'"axes": *"([A-Z]{2,9})"', description)
    if noted and ('C' in noted[1] or len(set(noted[1]) - set('YXS')) > 1):
        return f'the axes {noted[1]}'
    return ''


def arrange(values: np.ndarray, axes: str, path: Path) -> np.ndarray:
    """D H W C: channels and samples last, and of the other axes one at most longer than 1.

    Raises DataError.
    """
    long = [axis for axis, size in zip(axes, values.shape, strict=True) if size > 1]
    slices = [axis for axis in long if axis not in 'YXCS']
    if len(slices) > 1 or not {'Y', 'X'}.issubset(axes):
        raise DataError(
            f'{path} has the axes {axes} of {values.shape}: slices, rows, columns and channels are '
            f'read; save each step of {slices[0] if slices else axes[0]} as a file of its own'
        )
    leading = [i for i, axis in enumerate(axes) if axis not in 'YXCS']
    last = [i for i, axis in enumerate(axes) if axis in 'CS']
    rows, columns = axes.index('Y'), axes.index('X')
    depth = math.prod(values.shape[i] for i in leading)
    moved = values.transpose(*leading, rows, columns, *last)
    return moved.reshape(depth, values.shape[rows], values.shape[columns], -1)
