"""2D images and pages by Pillow, upright as viewers show them, with 8 or 16 bits per channel."""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pspnet_jax.data.formats import limits, tiff
from pspnet_jax.data.formats.limits import PIL_FORMATS, reading
from pspnet_jax.runtime.errors import DataError

logger = logging.getLogger(__name__)

MAX_SCANS = 100  # of a JPEG, each of which visits every pixel; programs write about 10
ORIENTATION = 0x0112  # EXIF tag of the camera's orientation
_told = set()


def load(paths: Sequence[Path], labels: bool) -> np.ndarray:
    """Read D H W C: one image, its pages, or images that are the slices of a volume."""
    image, d = None, 0
    for path in paths:
        with reading(path, 'picture'):
            pages = tiff.count_pages(path)
            if pages and (why := tiff.beyond_pillow(path, pages, labels)):
                found = tiff.load(path, why, labels)
                pages = len(found)
            else:
                take, pages = _label_pixels if labels else _image_pixels, max(pages, 1)
                found = _each_page(path, pages, take, len(paths))
            if pages > 1 and len(paths) > 1:
                raise DataError(
                    f'{path} has {pages} pages but is among single slices: read it separately'
                )
            for page, pixels in enumerate(found, 1):
                if image is None:
                    image = np.empty((len(paths) * pages, *pixels.shape), pixels.dtype)
                if (pixels.shape, pixels.dtype) != (image.shape[1:], image.dtype):
                    where = f'{path}, page {page},' if pages > 1 else path
                    raise DataError(
                        f'{where} is {pixels.shape} {pixels.dtype}, but {paths[0]} is '
                        f'{image.shape[1:]} {image.dtype}: all slices of a volume must be alike'
                    )
                image[d] = pixels
                d += 1
    return image


def palette(path: Path) -> np.ndarray | None:
    """D H W 3 uint8: the colours of an image with a palette; None for others."""
    with reading(path, 'picture'):
        pages = tiff.count_pages(path)
        if pages and tiff.beyond_pillow(path, pages, labels=True):
            return None
        with Image.open(path, formats=PIL_FORMATS) as picture:
            if picture.mode != 'P':
                return None
        colours = _each_page(path, max(pages, 1), lambda page, _: np.array(page.convert('RGB')), 3)
        return np.stack(list(colours))


def _each_page(path: Path, pages: int, take: Callable, beside: int) -> Iterator[np.ndarray]:
    """`take` of each page, H W C, of a file that is one of `beside` files read together."""
    with Image.open(path, formats=PIL_FORMATS) as picture:
        for page in range(pages):
            picture.seek(page)
            check(picture, path, beside * pages, beside * path.stat().st_size)
            turn = orientation(picture)  # before decoding, which rotates TIFFs
            yield _upright(take(picture, path), turn)


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Rotate H W C to the orientation that viewers and annotation tools show."""
    pixels = pixels.swapaxes(0, 1) if turn in (5, 6, 7, 8) else pixels
    rows, columns = (-1 if turn in flipped else 1 for flipped in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return pixels[::rows, ::columns]


def open_picture(path: Path) -> Image.Image:
    """The decoded image, or the first of several pages. Raises DataError."""
    if not os.path.isfile(path):  # a FIFO or a device would never end
        raise DataError(f'{path} is not a file: give an image')
    with reading(path, 'picture'):
        picture = Image.open(path, formats=PIL_FORMATS)
        check(picture, path, 1, path.stat().st_size)
        picture.load()
        return picture


def size(path: Path) -> tuple[int, int]:
    """(H, W) from the header, upright. Raises DataError."""
    with reading(path, 'picture'), Image.open(path, formats=PIL_FORMATS) as picture:
        width, height = picture.size
        return (width, height) if orientation(picture) in (5, 6, 7, 8) else (height, width)


def check(picture: Image.Image, path: Path, pictures: int, stored: int) -> None:
    """Raise DataError, before decoding, if `pictures` images like this one have too many values, or
    more than their `stored` bytes can hold.
    """
    deep = picture.mode in ('I', 'F')
    each = 4 if deep else 2 if '16' in picture.mode else 1
    shape = (pictures, *picture.size[::-1], len(picture.getbands()))
    limits.check_size(path, shape, each, stored * (8 if picture.mode == '1' else 1))
    if (side := max(picture.size)) > limits.MAX_SIDE:
        limit = f'the limit is {limits.MAX_SIDE} per side'
        raise DataError(f'{path} is {side} pixels long, but {limit}: cut it up')
    if picture.format in ('JPEG', 'MPO'):
        scans = path.read_bytes().count(b'\xff\xda')  # not possible within coded pixels
        if scans > MAX_SCANS:
            raise DataError(
                f'{path} has {scans} scans, but the limit is {MAX_SCANS}: save it again'
            )


def orientation(picture: Image.Image) -> int:
    """The EXIF orientation that is left to apply, 1 for none. Pillow rotates TIFFs itself.

    Raises DataError for TIFFs that it rotates wrongly.
    """
    if picture.format == 'PNG' and 'exif' not in picture.info:  # getexif would decode the image
        return 1
    if picture.format != 'TIFF':
        return picture.getexif().get(ORIENTATION, 1)
    tags = picture.tag_v2
    if tags.get(ORIENTATION, 1) in (5, 6, 7, 8) and tags.get(tiff.COMPRESSION, 1) == 1:
        raise DataError(
            f'{picture.filename} is stored rotated and without compression, which can not be read: '
            'save it upright'
        )
    return 1


def turn_by_exif(path: Path) -> int:
    """The EXIF orientation in an image file; 1 if there is none."""
    if not os.path.isfile(path):
        return 1
    try:
        with Image.open(path, formats=PIL_FORMATS) as picture:
            if picture.format == 'TIFF':
                return picture.tag_v2.get(ORIENTATION, 1)
            return orientation(picture)
    except Exception:  # decoders raise anything; reading the file reports it
        return 1


# Pixels H W C.


def _tell_once(level: int, text: str, *rest: object) -> None:
    """Log a kind of message only for the first file."""
    if text not in _told:
        _told.add(text)
        logger.log(level, text, *rest)


def _image_pixels(picture: Image.Image, path: Path) -> np.ndarray:
    """Grey as one channel, colour as three."""
    if picture.mode in ('LA', 'PA', 'RGBA'):
        _tell_once(logging.INFO, '%s: the alpha channel is dropped, also in other files', path)
    is_tiff, deep = picture.format == 'TIFF', _is_deep(picture)
    if picture.mode == 'RGBA' and is_tiff and len(np.unique(np.array(picture)[..., 3])) > 2:
        # Some programs mark any fourth band as alpha: near infrared, a fourth stain.
        text = (
            '%s marks its fourth band, which has many values, as alpha: it is dropped, also in '
            'other files; if it is a channel, save the TIFF with ExtraSamples 0'
        )
        _tell_once(logging.WARNING, text, path)
    if deep:
        return _deep_colour(picture, path)
    if picture.mode in ('P', 'PA', 'RGBA'):
        picture = picture.convert('RGB')
    elif picture.mode in ('1', 'LA'):
        picture = picture.convert('L')
    elif picture.mode not in ('L', 'RGB', 'F') and picture.mode[0] != 'I':
        raise DataError(f'{path} is {picture.mode}: convert it to grey or RGB')
    pixels = np.array(picture)
    if picture.mode == 'I' and is_tiff and picture.tag_v2.get(tiff.FORMAT, (1,))[0] == 1:
        pixels = pixels.view(np.uint32)  # Pillow has no mode for it
    if pixels.dtype == np.uint16 and _is_white_zero(picture):
        pixels = tiff.brighter_is_higher(pixels, path)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _label_pixels(picture: Image.Image, path: Path) -> np.ndarray:
    """One channel, or the three of an RGB mask, as they are stored.

    If all pixels have one colour but different alpha, the mask is the alpha channel.
    """
    if picture.mode == 'PA':
        raise DataError(f'{path} has a palette with alpha: save the mask without alpha')
    if picture.mode in ('1', 'P'):
        return np.array(picture)[..., None]
    if _is_white_zero(picture):
        text = '%s is stored with white as 0: masks, also other files, are read as stored'
        _tell_once(logging.WARNING, text, path)
        stored = np.array(picture)[..., None]
        return 255 - stored if picture.mode == 'L' else stored  # Pillow inverted 8 bits
    if picture.mode in ('LA', 'RGBA'):
        pixels = np.array(picture)
        colour, alpha = pixels[..., :-1], pixels[..., -1:]
        if (colour == colour[:1, :1]).all() and (alpha < 255).any():
            text = '%s: the mask is in the alpha channel, also in other files'
            _tell_once(logging.INFO, text, path)
            return alpha
    return _image_pixels(picture, path)


def _is_white_zero(picture: Image.Image) -> bool:
    """Whether a TIFF stores white as 0; 1-bit TIFFs are read as they are shown."""
    return picture.format == 'TIFF' and picture.tag_v2.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO


def _is_deep(picture: Image.Image) -> bool:
    """Whether a colour image has 16 bits per channel, of which Pillow keeps the upper 8."""
    if picture.mode not in ('RGB', 'RGBA'):
        return False
    bits = picture.tag_v2.get(tiff.BITS, (8,)) if picture.format == 'TIFF' else ()
    return max(bits, default=8) > 8 or any(';16' in str(tile.args) for tile in picture.tile)


def _deep_colour(picture: Image.Image, path: Path) -> np.ndarray:
    """H W 3 uint16, decoded twice, the second time with the bytes of each value swapped: Pillow has
    no 16-bit colour and keeps only the upper byte.
    """
    swap = {'B': 'L', 'L': 'B', 'N': 'B' if sys.byteorder == 'little' else 'L'}
    upper = np.array(picture)[..., :3].astype(np.uint16)
    with Image.open(path, formats=PIL_FORMATS) as again:
        again.seek(picture.tell())
        tiles = []
        for tile in again.tile:
            raw, *rest = (tile.args,) if isinstance(tile.args, str) else tile.args
            if not re.fullmatch('RGB[AX]?;16[BLN]', str(raw)):
                raise DataError(
                    f'{path} has 16 bits a channel in an unknown order ({raw}): save it as RGB '
                    'without alpha, pixel by pixel, or with 8 bits'
                )
            tiles.append(tile._replace(args=(raw[:-1] + swap[raw[-1]], *rest)))
        again.tile = tiles
        return upper << 8 | np.array(again)[..., :3]
