"""Flat pictures and pages: their pixels, upright, whatever their bits and colours."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from pspnet_jax.data import formats
from pspnet_jax.data.formats import flat
from pspnet_jax.runtime.errors import DataError


def has(package):
    try:
        __import__(package)
    except ImportError:
        return False
    return True


GREY = np.arange(20, dtype=np.uint8).reshape(4, 5) * 12
DEEP = GREY.astype(np.uint16) * 257 + 3
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


# Flat pictures.


def palette_picture(indices, colours):
    picture = Image.fromarray(indices, 'L')
    picture.putpalette(np.asarray(colours, np.uint8).tobytes())
    return picture


def palette():
    return palette_picture(GREY // 12, COLOUR.reshape(-1, 3))


FLAT = {  # name -> (PIL picture, the image that it is, the labels that it is)
    'grey.png': (Image.fromarray(GREY), GREY[..., None], GREY),
    'grey.bmp': (Image.fromarray(GREY), GREY[..., None], GREY),
    'grey.tif': (Image.fromarray(GREY), GREY[..., None], GREY),
    'deep.png': (Image.fromarray(DEEP), DEEP[..., None], DEEP),
    'deep.tif': (Image.fromarray(DEEP), DEEP[..., None], DEEP),
    'integers.tif': (Image.fromarray(DEEP.astype(np.int32)), DEEP[..., None], DEEP),
    'colour.png': (Image.fromarray(COLOUR), COLOUR, COLOUR),
    'colour.bmp': (Image.fromarray(COLOUR), COLOUR, COLOUR),
    'colour.tiff': (Image.fromarray(COLOUR), COLOUR, COLOUR),
    'alpha.png': (Image.fromarray(np.dstack([COLOUR, GREY])), COLOUR, COLOUR),
    'alpha.tif': (Image.fromarray(np.dstack([COLOUR, GREY])), COLOUR, COLOUR),
    'grey_alpha.png': (Image.fromarray(np.dstack([GREY, GREY]), 'LA'), GREY[..., None], GREY),
    'palette.png': (palette(), COLOUR, GREY // 12),
    'palette.tif': (palette(), COLOUR, GREY // 12),
    'palette.bmp': (palette(), COLOUR, GREY // 12),
    'bits.png': (
        Image.fromarray(GREY > 100),
        (255 * (GREY > 100)).astype(np.uint8)[..., None],
        (GREY > 100).astype(np.uint8),
    ),
}


@pytest.mark.parametrize('name', FLAT)
def test_a_picture_gives_its_pixels_and_its_labels(tmp_path, name):
    picture, image, labels = FLAT[name]
    picture.save(tmp_path / name)
    got = formats.read(tmp_path / name)
    assert got.image.dtype == image.dtype
    np.testing.assert_array_equal(got.image, image[None])
    assert (got.spacing, got.geometry, got.source) == (None, None, tmp_path / name)
    as_labels = formats.read_labels(tmp_path / name)
    assert as_labels.dtype == labels.dtype
    np.testing.assert_array_equal(as_labels, labels[None])


def test_a_jpeg_is_close_to_its_pixels_and_other_numbers_become_float32(tmp_path):
    smooth = np.broadcast_to(np.linspace(0, 255, 32)[:, None, None], (32, 32, 3)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / 'a.jpg', quality=95)
    image = formats.read(tmp_path / 'a.jpg').image
    assert image.shape == (1, 32, 32, 3)
    assert np.abs(image[0].astype(int) - smooth).max() < 12
    for name, values in (('f', GREY / np.float32(7)), ('i', GREY.astype(np.int32) - 1000)):
        Image.fromarray(values).save(tmp_path / f'{name}.tif')
        image = formats.read(tmp_path / f'{name}.tif').image
        assert image.dtype == np.float32
        np.testing.assert_array_equal(image[0, ..., 0], values)


@pytest.mark.parametrize('colour', [(0, 0, 0), (255, 0, 0), (255, 255, 255)])
def test_a_mask_in_the_alpha_channel_is_read_from_there(tmp_path, colour):
    """Where the colour is the same everywhere: an empty mask is transparent, or opaque black."""
    alpha = np.where(GREY > 100, 255, 0).astype(np.uint8)
    for name, values in (('some', alpha), ('none', alpha * 0)):
        flat = np.broadcast_to(np.array(colour, np.uint8), (*GREY.shape, 3))
        Image.fromarray(np.dstack([flat, values])).save(tmp_path / f'{name}.png')
        Image.fromarray(np.dstack([flat[..., :1], values]), 'LA').save(tmp_path / f'{name}_la.png')
        for path in (tmp_path / f'{name}.png', tmp_path / f'{name}_la.png'):
            np.testing.assert_array_equal(formats.read_labels(path), values[None])
    opaque = np.dstack([flat, np.full_like(alpha, 255)])
    Image.fromarray(opaque).save(tmp_path / 'opaque.png')
    np.testing.assert_array_equal(formats.read_labels(tmp_path / 'opaque.png')[0], flat)


@pytest.mark.parametrize('ending', ['png', 'tif', 'webp'])
@pytest.mark.parametrize('turn', range(1, 9))
def test_a_picture_is_read_upright_as_viewers_show_it(tmp_path, ending, turn):
    exif, path = Image.Exif(), tmp_path / f'a.{ending}'
    exif[flat.ORIENTATION] = turn
    options = {'tif': {'compression': 'tiff_lzw'}, 'webp': {'lossless': True}}.get(ending, {})
    Image.fromarray(COLOUR).save(path, exif=exif, **options)
    plain = Image.fromarray(COLOUR)
    plain.getexif()[flat.ORIENTATION] = turn
    np.testing.assert_array_equal(formats.read(path).image[0], ImageOps.exif_transpose(plain))
    np.testing.assert_array_equal(formats.read_labels(path)[0], ImageOps.exif_transpose(plain))


def test_a_tiff_that_pillow_turns_wrongly_is_refused(tmp_path):
    exif = Image.Exif()
    exif[flat.ORIENTATION] = 6
    Image.fromarray(COLOUR).save(tmp_path / 'a.tif', exif=exif)
    with pytest.raises(DataError, match=r'a\.tif is stored rotated and without compression'):
        formats.read(tmp_path / 'a.tif')


def test_webp_is_read_as_it_was_packed(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / 'a.webp', lossless=True)
    np.testing.assert_array_equal(formats.read(tmp_path / 'a.webp').image[0], COLOUR)


def deep_colour_png(path, values_HWC):
    H, W, C = values_HWC.shape

    def chunk(kind, data):
        crc = struct.pack('>I', zlib.crc32(kind + data))
        return struct.pack('>I', len(data)) + kind + data + crc

    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values_HWC)
    head = struct.pack('>IIBBBBB', W, H, 16, {3: 2, 4: 6}[C], 0, 0, 0)
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', head)
        + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )


def deep_colour_tiff(path, values_HWC, order='<', deflate=False, planar=False):
    """A TIFF of one strip, by the specification."""
    H, W, C = values_HWC.shape
    values = values_HWC.transpose(2, 0, 1) if planar else values_HWC
    data = values.astype(f'{order}u2').tobytes()
    data = zlib.compress(data) if deflate else data
    at = 8 + 2 * C  # the data, behind the table of bits
    entries = [
        (256, 4, 1, W),
        (257, 4, 1, H),
        (258, 3, C, 8),
        (259, 3, 1, 8 if deflate else 1),
        (262, 3, 1, 2),
        (273, 4, 1, at),
        (277, 3, 1, C),
        (278, 4, 1, H),
        (279, 4, 1, len(data)),
        (284, 3, 1, 2 if planar else 1),
    ]
    if planar:  # a strip a channel
        entries = [e for e in entries if e[0] not in (273, 279)]
        where = at + len(data)
        entries += [(273, 4, C, where), (279, 4, C, where + 4 * C)]
        each = len(data) // C
        data += struct.pack(f'{order}{C}I', *(at + c * each for c in range(C)))
        data += struct.pack(f'{order}{C}I', *[each] * C)
    table = struct.pack(f'{order}H', len(entries))
    for tag, kind, count, value in sorted(entries):
        packed = struct.pack(f'{order}I' if kind == 4 or count > 1 else f'{order}Hxx', value)
        table += struct.pack(f'{order}HHI', tag, kind, count) + packed
    first = at + len(data)
    head = {'<': b'II', '>': b'MM'}[order] + struct.pack(f'{order}HI', 42, first)
    bits = struct.pack(f'{order}{C}H', *[16] * C)
    path.write_bytes(head + bits + data + table + bytes(4))


@pytest.mark.parametrize('channels', [3, 4])
def test_colour_of_16_bits_keeps_them(tmp_path, rng, channels):
    """PIL has no such mode and drops the lower eight."""
    values = rng.integers(0, 2**16, (6, 7, channels), np.uint16)
    deep_colour_png(tmp_path / 'a.png', values)
    for order, deflate in itertools.product('<>', (False, True)):
        deep_colour_tiff(tmp_path / f'{"le" if order == "<" else "be"}{deflate}.tif', values, order)
    for path in sorted(tmp_path.iterdir()):
        image = formats.read(path).image
        assert image.dtype == np.uint16
        np.testing.assert_array_equal(image[0], values[..., :3], err_msg=path.name)
    deep_colour_tiff(tmp_path / 'planar.tif', values, planar=True)
    with pytest.raises(DataError, match=r'planar\.tif has 16 bits a channel'):
        formats.read(tmp_path / 'planar.tif')


def test_pages_are_slices_and_alike(tmp_path, rng):
    pages = rng.integers(0, 255, (12, 6, 5, 3), np.uint8)
    first, *rest = map(Image.fromarray, pages)
    first.save(tmp_path / 'a.tif', save_all=True, append_images=rest)
    np.testing.assert_array_equal(formats.read(tmp_path / 'a.tif').image, pages)
    np.testing.assert_array_equal(formats.read_labels(tmp_path / 'a.tif'), pages)
    odd = [*rest, Image.fromarray(pages[0, :3])]
    first.save(tmp_path / 'b.tif', save_all=True, append_images=odd)
    with pytest.raises(DataError, match='page 13'):
        formats.read(tmp_path / 'b.tif')


def test_a_folder_of_slices_is_a_volume_in_the_order_of_its_numbers(tmp_path, rng):
    slices = rng.integers(0, 9, (12, 6, 5), np.uint8)
    for n, pixels in enumerate(slices, 1):
        Image.fromarray(pixels).save(tmp_path / f'case_{n}.png')
    picture = formats.read(tmp_path)
    np.testing.assert_array_equal(picture.image[..., 0], slices)
    formats.write_labels(tmp_path / 'masks', slices // 2, picture)
    for n, pixels in enumerate(slices, 1):
        back = np.array(Image.open(tmp_path / 'masks' / f'case_{n}.png'))
        np.testing.assert_array_equal(back, pixels // 2)
    assert len(list((tmp_path / 'masks').iterdir())) == 12
    Image.fromarray(slices[0, :3]).save(tmp_path / 'case_13.png')
    with pytest.raises(DataError, match=r'case_13\.png.*case_1\.png'):
        formats.read(tmp_path)


def gif_bytes():
    """PIL knows some forty formats; ours are the four that are asked of it."""
    file = io.BytesIO()
    Image.fromarray(GREY).save(file, 'gif')
    return file.getvalue()


def test_a_picture_of_another_kind_is_not_to_be_copied_alone(tmp_path):
    (tmp_path / 'a.png').write_bytes(gif_bytes())
    with pytest.raises(DataError, match=r'save it as PNG: its content is not PNG, JPEG'):
        formats.read(tmp_path / 'a.png')
