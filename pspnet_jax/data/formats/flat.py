"""Flat pictures and pages by Pillow, upright as viewers show them, with 8 or 16 bits a channel."""

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

MAX_SCANS = 100  # of a JPEG, each of which visits every pixel; programs write some 10
ORIENTATION = 0x0112  # EXIF tag: how cameras say that they were held upright
_told = set()


def load(paths: Sequence[Path], labels: bool) -> np.ndarray:
    """D H W C of one picture, its pages, or pictures that are the slices of a volume."""
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
                raise DataError(f'{path} has {pages} pages among single slices: read it by itself')
            for page, pixels in enumerate(found, 1):
                if image is None:
                    image = np.empty((len(paths) * pages, *pixels.shape), pixels.dtype)
                if (pixels.shape, pixels.dtype) != (image.shape[1:], image.dtype):
                    where = f'{path}, page {page},' if pages > 1 else path
                    raise DataError(
                        f'{where} is {pixels.shape} {pixels.dtype}, {paths[0]} {image.shape[1:]} '
                        f'{image.dtype}: the slices of a volume are alike'
                    )
                image[d] = pixels
                d += 1
    return image


def palette(path: Path) -> np.ndarray | None:
    """D H W 3 uint8: the colours of a picture that has a palette, None of others."""
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
    """H W C that is taken of each page of one of `beside` files that are read together."""
    with Image.open(path, formats=PIL_FORMATS) as picture:
        for page in range(pages):
            picture.seek(page)
            check(picture, path, beside * pages, beside * path.stat().st_size)
            turn = orientation(picture)  # before it is decoded, which turns TIFFs
            yield _upright(take(picture, path), turn)


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """H W C as viewers and annotation tools show it."""
    pixels = pixels.swapaxes(0, 1) if turn in (5, 6, 7, 8) else pixels
    rows, columns = (-1 if turn in flipped else 1 for flipped in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return pixels[::rows, ::columns]


def open_picture(path: Path) -> Image.Image:
    """The decoded picture, of several pages the first. Raises DataError."""
    if not os.path.isfile(path):  # a FIFO or a device would never end
        raise DataError(f'{path} is not a file: give a picture')
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
    """Raise DataError where `pictures` like this one are too many values, or too many for the
    bytes that hold them, before they are decoded.
    """
    deep = picture.mode in ('I', 'F')
    each = 4 if deep else 2 if '16' in picture.mode else 1
    shape = (pictures, *picture.size[::-1], len(picture.getbands()))
    limits.check_size(path, shape, each, stored * (8 if picture.mode == '1' else 1))
    if (side := max(picture.size)) > limits.MAX_SIDE:
        limit = f'the limit is {limits.MAX_SIDE} a side'
        raise DataError(f'{path} is {side} pixels long, {limit}: cut it up')
    if picture.format in ('JPEG', 'MPO'):
        scans = path.read_bytes().count(b'\xff\xda')  # which coded pixels can't be
        if scans > MAX_SCANS:
            raise DataError(f'{path} has {scans} scans, the limit is {MAX_SCANS}: save it again')


def orientation(picture: Image.Image) -> int:
    """The turn of EXIF that is left to do, 1 for none. Pillow turns TIFFs itself.

    Raises DataError for those that it turns wrongly.
    """
    if picture.format == 'PNG' and 'exif' not in picture.info:  # where Pillow would decode it
        return 1
    if picture.format != 'TIFF':
        return picture.getexif().get(ORIENTATION, 1)
    tags = picture.tag_v2
    if tags.get(ORIENTATION, 1) in (5, 6, 7, 8) and tags.get(tiff.COMPRESSION, 1) == 1:
        raise DataError(
            f'{picture.filename} is stored turned and without compression, which is not read: '
            'save it upright'
        )
    return 1


def turn_by_exif(path: Path) -> int:
    """The orientation that a picture's file asks for; 1 of all else."""
    if not os.path.isfile(path):
        return 1
    try:
        with Image.open(path, formats=PIL_FORMATS) as picture:
            if picture.format == 'TIFF':
                return picture.tag_v2.get(ORIENTATION, 1)
            return orientation(picture)
    except Exception:  # of any kind, as decoders raise; reading reports it
        return 1


# Pixels H W C.


def _tell_once(level: int, text: str, *rest: object) -> None:
    """The first of a kind is named in the log, the others are like it."""
    if text not in _told:
        _told.add(text)
        logger.log(level, text, *rest)


def _image_pixels(picture: Image.Image, path: Path) -> np.ndarray:
    """Grey as one channel, colour as three."""
    if picture.mode in ('LA', 'PA', 'RGBA'):
        _tell_once(logging.INFO, '%s: alpha is dropped, here and in others', path)
    is_tiff, deep = picture.format == 'TIFF', _is_deep(picture)
    if picture.mode == 'RGBA' and is_tiff and len(np.unique(np.array(picture)[..., 3])) > 2:
        # Some programs say of any fourth band that it is alpha: near infrared, a fourth stain.
        text = (
            '%s says that its fourth band, of many values, is alpha: it is dropped, here and in '
            'others; if it is a channel, save the TIFF with ExtraSamples 0'
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
        pixels = pixels.view(np.uint32)  # Pillow has no such mode
    if pixels.dtype == np.uint16 and _is_white_zero(picture):
        pixels = tiff.brighter_is_higher(pixels, path)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _label_pixels(picture: Image.Image, path: Path) -> np.ndarray:
    """One channel, or the three of an RGB mask, as they are stored.

    Where all is of one colour and alpha is not, the mask is alpha.
    """
    if picture.mode == 'PA':
        raise DataError(f'{path} has a palette with alpha: save the mask without alpha')
    if picture.mode in ('1', 'P'):
        return np.array(picture)[..., None]
    if _is_white_zero(picture):
        text = '%s says that 0 is white: of masks, here and in others, the stored values count'
        _tell_once(logging.WARNING, text, path)
        stored = np.array(picture)[..., None]
        return 255 - stored if picture.mode == 'L' else stored  # Pillow turned 8 bits round
    if picture.mode in ('LA', 'RGBA'):
        pixels = np.array(picture)
        colour, alpha = pixels[..., :-1], pixels[..., -1:]
        if (colour == colour[:1, :1]).all() and (alpha < 255).any():
            text = '%s: the mask is in the alpha channel, here and in others'
            _tell_once(logging.INFO, text, path)
            return alpha
    return _image_pixels(picture, path)


def _is_white_zero(picture: Image.Image) -> bool:
    """Of a TIFF of numbers; 1-bit ones are read as they are shown."""
    return picture.format == 'TIFF' and picture.tag_v2.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO


def _is_deep(picture: Image.Image) -> bool:
    """Has a colour picture 16 bits a channel? Pillow keeps the upper 8."""
    if picture.mode not in ('RGB', 'RGBA'):
        return False
    bits = picture.tag_v2.get(tiff.BITS, (8,)) if picture.format == 'TIFF' else ()
    return max(bits, default=8) > 8 or any(';16' in str(tile.args) for tile in picture.tile)


def _deep_colour(picture: Image.Image, path: Path) -> np.ndarray:
    """H W 3 uint16: decoded twice, the second time with the bytes of each value swapped, since
    Pillow has no colour of 16 bits and keeps the byte that it takes for the upper one.
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
                    f'{path} has 16 bits a channel in an order that is not read ({raw}): save it '
                    'as RGB without alpha, pixel by pixel, or with 8 bits'
                )
            tiles.append(tile._replace(args=(raw[:-1] + swap[raw[-1]], *rest)))
        again.tile = tiles
        return upper << 8 | np.array(again)[..., :3]
