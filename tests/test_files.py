"""Files in and out: pixels, geometry, and what is not to be trusted."""

import contextlib
import errno
import gzip
import io
import itertools
import os
import resource
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pspnet_jax.data import files
from pspnet_jax.errors import DataError


def has(package):
    try:
        __import__(package)
    except ImportError:
        return False
    return True


needs_nibabel = pytest.mark.skipif(not has('nibabel'), reason='nibabel is not installed')
needs_pydicom = pytest.mark.skipif(
    not (has('nibabel') and has('pydicom')), reason='nibabel and pydicom are not both installed'
)

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
    got = files.read(tmp_path / name)
    assert got.image.dtype == image.dtype
    np.testing.assert_array_equal(got.image, image[None])
    assert (got.spacing, got.geometry, got.source) == (None, None, tmp_path / name)
    as_labels = files.read_labels(tmp_path / name)
    assert as_labels.dtype == labels.dtype
    np.testing.assert_array_equal(as_labels, labels[None])


def test_a_jpeg_is_close_to_its_pixels_and_other_numbers_become_float32(tmp_path):
    smooth = np.broadcast_to(np.linspace(0, 255, 32)[:, None, None], (32, 32, 3)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / 'a.jpg', quality=95)
    image = files.read(tmp_path / 'a.jpg').image
    assert image.shape == (1, 32, 32, 3)
    assert np.abs(image[0].astype(int) - smooth).max() < 12
    for name, values in (('f', GREY / np.float32(7)), ('i', GREY.astype(np.int32) - 1000)):
        Image.fromarray(values).save(tmp_path / f'{name}.tif')
        image = files.read(tmp_path / f'{name}.tif').image
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
            np.testing.assert_array_equal(files.read_labels(path), values[None])
    opaque = np.dstack([flat, np.full_like(alpha, 255)])
    Image.fromarray(opaque).save(tmp_path / 'opaque.png')
    np.testing.assert_array_equal(files.read_labels(tmp_path / 'opaque.png')[0], flat)


@pytest.mark.parametrize('ending', ['png', 'tif', 'webp'])
@pytest.mark.parametrize('turn', range(1, 9))
def test_a_picture_is_read_upright_as_viewers_show_it(tmp_path, ending, turn):
    exif, path = Image.Exif(), tmp_path / f'a.{ending}'
    exif[files.ORIENTATION] = turn
    options = {'tif': {'compression': 'tiff_lzw'}, 'webp': {'lossless': True}}.get(ending, {})
    Image.fromarray(COLOUR).save(path, exif=exif, **options)
    plain = Image.fromarray(COLOUR)
    plain.getexif()[files.ORIENTATION] = turn
    np.testing.assert_array_equal(files.read(path).image[0], ImageOps.exif_transpose(plain))
    np.testing.assert_array_equal(files.read_labels(path)[0], ImageOps.exif_transpose(plain))


def test_a_tiff_that_pillow_turns_wrongly_is_refused(tmp_path):
    exif = Image.Exif()
    exif[files.ORIENTATION] = 6
    Image.fromarray(COLOUR).save(tmp_path / 'a.tif', exif=exif)
    with pytest.raises(DataError, match=r'a\.tif is stored turned and without compression'):
        files.read(tmp_path / 'a.tif')


def test_webp_is_read_as_it_was_packed(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / 'a.webp', lossless=True)
    np.testing.assert_array_equal(files.read(tmp_path / 'a.webp').image[0], COLOUR)


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
        image = files.read(path).image
        assert image.dtype == np.uint16
        np.testing.assert_array_equal(image[0], values[..., :3], err_msg=path.name)
    deep_colour_tiff(tmp_path / 'planar.tif', values, planar=True)
    with pytest.raises(DataError, match=r'planar\.tif has 16 bits a channel'):
        files.read(tmp_path / 'planar.tif')


def test_pages_are_slices_and_alike(tmp_path, rng):
    pages = rng.integers(0, 255, (12, 6, 5, 3), np.uint8)
    first, *rest = map(Image.fromarray, pages)
    first.save(tmp_path / 'a.tif', save_all=True, append_images=rest)
    np.testing.assert_array_equal(files.read(tmp_path / 'a.tif').image, pages)
    np.testing.assert_array_equal(files.read_labels(tmp_path / 'a.tif'), pages)
    odd = [*rest, Image.fromarray(pages[0, :3])]
    first.save(tmp_path / 'b.tif', save_all=True, append_images=odd)
    with pytest.raises(DataError, match='page 13'):
        files.read(tmp_path / 'b.tif')


def test_a_folder_of_slices_is_a_volume_in_the_order_of_its_numbers(tmp_path, rng):
    slices = rng.integers(0, 9, (12, 6, 5), np.uint8)
    for n, pixels in enumerate(slices, 1):
        Image.fromarray(pixels).save(tmp_path / f'case_{n}.png')
    picture = files.read(tmp_path)
    np.testing.assert_array_equal(picture.image[..., 0], slices)
    files.write_labels(tmp_path / 'masks', slices // 2, picture)
    for n, pixels in enumerate(slices, 1):
        back = np.array(Image.open(tmp_path / 'masks' / f'case_{n}.png'))
        np.testing.assert_array_equal(back, pixels // 2)
    assert len(list((tmp_path / 'masks').iterdir())) == 12
    Image.fromarray(slices[0, :3]).save(tmp_path / 'case_13.png')
    with pytest.raises(DataError, match=r'case_13\.png.*case_1\.png'):
        files.read(tmp_path)


def test_arrays(tmp_path, rng):
    values = rng.normal(size=(3, 4, 5, 2))
    for name, array, shape in (('d', values, (3, 4, 5, 2)), ('c', values[0], (1, 4, 5, 2))):
        np.save(tmp_path / f'{name}.npy', array)
        image = files.read(tmp_path / f'{name}.npy').image
        np.testing.assert_array_equal(image, array.astype(np.float32).reshape(shape))
    labels = rng.integers(0, 4, (3, 4, 5))
    np.save(tmp_path / 'labels.npy', labels)
    np.testing.assert_array_equal(files.read_labels(tmp_path / 'labels.npy'), labels)
    np.save(tmp_path / 'objects.npy', np.array([[{}]]), allow_pickle=True)
    with pytest.raises(DataError, match=r'objects\.npy is not a readable array'):
        files.read(tmp_path / 'objects.npy')


# Volumes with a place in space.

AXES = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def rotation(degrees):
    """Oblique: a small turn about each axis."""
    turned = np.eye(3)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        once = np.eye(3)
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        once[i, i], once[i, j], once[j, i], once[j, j] = c, -s, s, c
        turned = turned @ once
    return turned


def affine_of(order, signs, sizes=(1.0, 2.0, 3.5), degrees=0.0):
    """Axis i of the file goes along (right, front, head)[order[i]], forwards or backwards."""
    affine = np.eye(4)
    matrix = np.zeros((3, 3))
    for i in range(3):
        matrix[order[i], i] = signs[i] * sizes[i]
    affine[:3, :3] = rotation(degrees) @ matrix
    affine[:3, 3] = (-12.5, 30.0, 4.25)
    return affine


@needs_nibabel
@pytest.mark.parametrize('degrees', [0.0, 9.0])
def test_every_orientation_is_read_alike_and_written_back(tmp_path, rng, degrees):
    import nibabel

    for order, signs in AXES:
        affine = affine_of(order, signs, degrees=degrees)
        values = rng.integers(0, 200, (4, 5, 6)).astype(np.uint8)
        path, out = tmp_path / 'a.nii', tmp_path / 'labels.nii.gz'
        original = nibabel.Nifti1Image(values, affine)
        original.set_qform(affine, 1)
        nibabel.save(original, path)
        picture = files.read(path)
        # nibabel's own: axes towards right, front, head; ours: head, back, left.
        canonical = np.asarray(nibabel.as_closest_canonical(original).dataobj)
        expected = canonical[::-1, ::-1, :].transpose(2, 1, 0)
        np.testing.assert_array_equal(picture.image[..., 0], expected)
        sizes = (1.0, 2.0, 3.5)
        by_hand = [sizes[order.index(line)] for line in (2, 1, 0)]
        np.testing.assert_allclose(picture.spacing, by_hand, rtol=1e-6)

        labels = picture.image[..., 0] // 9
        out = tmp_path / 'labels.nii'
        files.write_labels(out, labels, picture)
        back = nibabel.load(out)
        np.testing.assert_array_equal(np.asarray(back.dataobj), values // 9)
        assert back.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(back.affine, nibabel.load(path).affine)
        assert back.header.get_zooms() == nibabel.load(path).header.get_zooms()
        np.testing.assert_array_equal(files.read_labels(out, like=picture), labels)


@needs_nibabel
def test_where_things_are(tmp_path):
    """A spot at the patient's right, front and head is in the last slice, top row, left column."""
    import nibabel

    affine = affine_of((2, 0, 1), (-1, 1, -1))
    values = np.zeros((4, 5, 6), np.uint8)
    ends = np.array(list(itertools.product((0, 3), (0, 4), (0, 5))))
    places = ends @ affine[:3, :3].T + affine[:3, 3]
    values[tuple(ends[places.sum(1).argmax()])] = 1
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / 'a.nii')
    picture = files.read(tmp_path / 'a.nii')
    assert picture.image.shape == (4, 6, 5, 1)
    assert picture.image[-1, 0, 0, 0] == 1


@needs_nibabel
@pytest.mark.parametrize(
    ('shape', 'seen', 'corner'),
    [  # the corner is the picture's first voxel: which end of right, front, head
        ((1, 5, 6), (1, 6, 5), (0, 4, 5)),  # sagittal: head up, front on the left
        ((4, 1, 6), (1, 6, 4), (3, 0, 5)),  # coronal: head up, right on the left
        ((4, 5, 1), (1, 5, 4), (3, 4, 0)),
        ((4, 5), (1, 5, 4), (3, 4)),
    ],
)
def test_a_single_slice_is_seen_from_the_front_of_it(tmp_path, shape, seen, corner):
    import nibabel

    values = np.zeros(shape, np.uint8)
    values[corner] = 7
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / 'a.nii')
    picture = files.read(tmp_path / 'a.nii')
    assert picture.image.shape == (*seen, 1)
    assert picture.image[0, 0, 0, 0] == 7
    files.write_labels(tmp_path / 'b.nii', picture.image[..., 0], picture)
    back = np.asarray(nibabel.load(tmp_path / 'b.nii').dataobj)
    np.testing.assert_array_equal(back.reshape(shape), values)


def save_nifti(path, values, affine=None, *, slope=1.0, intercept=0.0, second=False, **fields):
    import nibabel

    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    image = kind(values, np.eye(4) if affine is None else affine)
    for name, value in fields.items():
        image.header[name] = value
    stored = bytearray(image.to_bytes())
    if (slope, intercept) != (1, 0):  # nibabel would choose its own
        at, pair = (176, '<dd') if second else (112, '<ff')
        struct.pack_into(pair, stored, at, slope, intercept)
    path.write_bytes(gzip.compress(stored) if path.suffix == '.gz' else stored)
    return path


@needs_nibabel
def test_numbers_of_volumes(tmp_path, rng):
    import nibabel

    whole = rng.integers(0, 4000, (3, 4, 5)).astype(np.int16)
    for name, values, dtype in (
        ('positive', whole, np.uint16),
        ('negative', whole - 1024, np.float32),
        ('bytes', whole.astype(np.uint8), np.uint8),
        ('doubles', whole / 7, np.float32),
        ('big_endian', whole.astype('>i2'), np.uint16),
    ):
        path = save_nifti(tmp_path / f'{name}.nii.gz', values)
        image = files.read(path).image
        assert image.dtype == dtype, name
        expected = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
        expected = expected[::-1, ::-1].transpose(2, 1, 0)[..., None]
        np.testing.assert_allclose(image, expected, rtol=1e-6, err_msg=name)
    path = save_nifti(tmp_path / 'scaled.nii', whole, slope=0.25, intercept=-100.0)
    expected = whole[::-1, ::-1].transpose(2, 1, 0) * 0.25 - 100
    image = files.read(path).image
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image[..., 0], expected)
    np.testing.assert_allclose(nibabel.load(path).get_fdata().max(), expected.max())


@needs_nibabel
def test_a_volume_is_unpacked_by_what_it_holds_not_by_its_name(tmp_path, rng):
    """Some tools write .nii.gz that are not packed, and others the other way round."""
    values = rng.integers(0, 255, (3, 4, 5), np.uint8)
    plain = save_nifti(tmp_path / 'a.nii', values)
    packed = save_nifti(tmp_path / 'b.nii.gz', values)
    expected = files.read(plain).image
    for source, name in ((plain, 'c.nii.gz'), (packed, 'd.nii')):
        (tmp_path / name).write_bytes(source.read_bytes())
        np.testing.assert_array_equal(files.read(tmp_path / name).image, expected)
    picture = files.read(tmp_path / 'c.nii.gz')
    files.write_labels(tmp_path / 'mask.nii.gz', expected[..., 0], picture)
    assert (tmp_path / 'mask.nii.gz').read_bytes()[:2] == b'\x1f\x8b'


def test_a_picture_of_another_kind_is_not_to_be_copied_alone(tmp_path):
    (tmp_path / 'a.png').write_bytes(gif_bytes())
    with pytest.raises(DataError, match=r'save it as PNG: its content is none of PNG, JPEG'):
        files.read(tmp_path / 'a.png')


@needs_nibabel
def test_what_is_no_number_becomes_0(tmp_path, caplog):
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    values[0, 0] = np.nan
    values[1, 1, 1] = -np.inf
    image = files.read(save_nifti(tmp_path / 'a.nii', values)).image[..., 0]
    expected = np.where(np.isfinite(values), values, 0)[::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(image, expected)
    huge = np.where(values > 30, 1e300, 1.0)  # beyond float32
    image = files.read(save_nifti(tmp_path / 'huge.nii', huge)).image
    assert set(image.ravel().tolist()) == {0.0, 1.0}
    with pytest.raises(DataError, match='no number at all'):
        files.read(save_nifti(tmp_path / 'b.nii', values * np.nan))


@needs_nibabel
def test_the_fourth_axis_is_channels(tmp_path, rng):
    values = rng.integers(0, 255, (3, 4, 5, 2), np.uint8)
    expected = values[::-1, ::-1].transpose(2, 1, 0, 3)
    for name, shaped in (('four', values), ('vector', values[:, :, :, None])):
        image = files.read(save_nifti(tmp_path / f'{name}.nii', shaped)).image
        np.testing.assert_array_equal(image, expected)
    picture = files.read(tmp_path / 'four.nii')
    files.write_labels(tmp_path / 'labels.nii', expected[..., 0], picture)
    assert files.read_labels(tmp_path / 'labels.nii', like=picture).shape == (5, 4, 3)
    with pytest.raises(DataError, match='2 values a voxel'):
        files.read_labels(tmp_path / 'four.nii')
    with pytest.raises(DataError, match='dimensions'):
        files.read(save_nifti(tmp_path / 'five.nii', np.zeros((2, 2, 2, 2, 2), np.uint8)))
    with pytest.raises(DataError, match='voxels of'):
        files.read(save_nifti(tmp_path / 'complex.nii', np.zeros((2, 2, 2), np.complex64)))


@needs_nibabel
def test_spacing_is_in_millimetres(tmp_path):
    values = np.zeros((3, 4, 5), np.uint8)
    affine = np.diag([300.0, 400.0, 5000.0, 1.0])
    path = save_nifti(tmp_path / 'a.nii', values, affine, xyzt_units=3)  # micrometres
    np.testing.assert_allclose(files.read(path).spacing, (5.0, 0.4, 0.3))


@needs_nibabel
@pytest.mark.parametrize('second', [False, True])
def test_labels_carry_the_header_of_their_image(tmp_path, rng, second):
    import nibabel

    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    image = kind(rng.normal(size=(3, 4, 5)), affine_of((1, 0, 2), (1, -1, 1), degrees=5.0))
    image.set_sform(image.affine, 4)
    image.set_qform(image.affine, 1)
    image.header.set_xyzt_units('mm', 'sec')
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension('comment', b'of the image'))
    nibabel.save(image, tmp_path / 'a.nii')
    picture = files.read(tmp_path / 'a.nii')
    labels = np.full(picture.image.shape[:3], 700)
    files.write_labels(tmp_path / 'b.nii', labels, picture)
    image, back = nibabel.load(tmp_path / 'a.nii'), nibabel.load(tmp_path / 'b.nii')
    assert type(back) is kind
    assert back.get_data_dtype() == np.int16
    assert (np.asarray(back.dataobj) == 700).all()
    assert (back.dataobj.slope, back.dataobj.inter) == (1, 0)
    for field in ('qform_code', 'sform_code', 'xyzt_units', 'pixdim', 'quatern_b', 'srow_x'):
        np.testing.assert_array_equal(back.header[field], image.header[field], err_msg=field)
    assert not back.header.extensions


@needs_nibabel
def test_a_mask_must_lie_where_its_image_lies(tmp_path, rng):
    affine = affine_of((0, 1, 2), (1, 1, 1))
    values = rng.integers(0, 3, (4, 5, 6)).astype(np.uint8)
    picture = files.read(save_nifti(tmp_path / 'image.nii.gz', values, affine))
    plain = files.read_labels(save_nifti(tmp_path / 'mask.nii', values, affine), like=picture)
    # The same voxels stored from the other side, and as floats: the same mask.
    other = affine @ np.array([[-1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    flipped = save_nifti(tmp_path / 'flipped.nii', values[::-1].astype(np.float32), other)
    np.testing.assert_array_equal(files.read_labels(flipped, like=picture), plain)
    moved = affine.copy()
    moved[0, 3] += 1.0
    for name, mask, where, word in (
        ('moved', values, moved, 'apart'),
        ('cropped', values[1:], affine, 'one size'),
        ('coarse', values, affine @ np.diag([2, 1, 1, 1.0]), 'voxels of'),
    ):
        path = save_nifti(tmp_path / f'{name}.nii', mask, where)
        with pytest.raises(DataError, match=rf'{name}\.nii and .*image\.nii\.gz.*{word}'):
            files.read_labels(path, like=picture)
    half = save_nifti(tmp_path / 'half.nii', values * np.float32(0.5), affine)
    with pytest.raises(DataError, match=r'half\.nii holds 0\.5, labels are whole'):
        files.read_labels(half)


@needs_nibabel
def test_a_mask_that_lacks_its_affine_is_told_to_take_the_images(tmp_path, rng):
    """Arrays that were saved alone: by nibabel without an affine or with 1, by SimpleITK."""
    import nibabel

    affine = affine_of((0, 1, 2), (1, 1, 1))
    values = rng.integers(0, 3, (4, 5, 6)).astype(np.uint8)
    picture = files.read(save_nifti(tmp_path / 'image.nii.gz', values, affine))
    expected = files.read_labels(save_nifti(tmp_path / 'true.nii', values, affine), like=picture)
    path = tmp_path / 'mask.nii'
    for without in (None, np.eye(4), np.diag([-1.0, -1.0, 1.0, 1.0])):
        nibabel.save(nibabel.Nifti1Image(values, without), path)
        with pytest.raises(DataError, match=r'mask\.nii does not say where it lies') as told:
            files.read_labels(path, like=picture)
        assert 'resample' not in str(told.value)
        script = str(told.value).partition('python -c "')[2].rstrip('"')
        exec(compile(script, 'advice', 'exec'), {})  # what is to be pasted does it
        np.testing.assert_array_equal(files.read_labels(path, like=picture), expected)
    plain = files.read(save_nifti(tmp_path / 'plain.nii', values, np.eye(4)))
    with pytest.raises(DataError, match=r'plain\.nii does not say where it lies'):
        files.read_labels(path, like=plain)


@needs_nibabel
def test_scaled_labels_come_out_whole(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4) * 10
    path = save_nifti(tmp_path / 'a.nii', values, slope=0.1, intercept=2.0)
    labels = files.read_labels(path)
    np.testing.assert_array_equal(labels, (values // 10 + 2)[::-1, ::-1].transpose(2, 1, 0))


def test_sequences_become_channels(tmp_path, rng):
    a, b = rng.integers(0, 255, (2, 6, 5), np.uint8)
    Image.fromarray(a).save(tmp_path / 'a.png')
    Image.fromarray(b.astype(np.uint16) * 100).save(tmp_path / 'b.png')
    Image.fromarray(b[:4]).save(tmp_path / 'c.png')
    one, two, other = (files.read(tmp_path / f'{name}.png') for name in 'abc')
    both = files.stack([one, two])
    assert both.image.dtype == np.uint16
    np.testing.assert_array_equal(both.image[0], np.dstack([a, b.astype(np.uint16) * 100]))
    with pytest.raises(DataError, match=r'c\.png and .*a\.png are not of one size'):
        files.stack([one, other])
    far = [p._replace(spacing=s) for p, s in ((one, (3.0, 1.0, 1.0)), (two, (3.0, 1.0, 0.9)))]
    with pytest.raises(DataError, match=r'b\.png and .*a\.png have voxels of'):
        files.stack(far)


# DICOM.


def save_dicom(path, pixels, *, position=None, turned=(1, 0, 0, 0, 1, 0), series='1.2.3', **more):
    """pydicom's way to make a file, with what a scanner says of place and scale."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = more.pop('syntax', ExplicitVRLittleEndian)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SeriesInstanceUID = series
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = 'MONOCHROME2' if pixels.ndim == 2 else 'RGB'
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == 'i')
    if position is not None:
        data.ImagePositionPatient = list(position)
        data.ImageOrientationPatient = list(turned)
        data.PixelSpacing = [0.5, 0.75]
    for name, value in more.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    data.save_as(path, enforce_file_format=True)


@needs_pydicom
def test_a_dicom_series_is_a_volume(tmp_path, rng):
    import nibabel

    stored = rng.integers(0, 3000, (5, 4, 6)).astype(np.uint16)
    folder = tmp_path / 'series'
    folder.mkdir()
    for n, d in enumerate([3, 0, 4, 1, 2]):  # the names say nothing about the order
        save_dicom(
            folder / f'IM{n}',
            stored[d],
            position=(-10.0, 20.0, 100.0 + 2.5 * d),
            RescaleSlope=1,
            RescaleIntercept=-1024,
        )
    picture = files.read(folder)
    # Feet to head, front to back, right to left: how an axial DICOM is stored.
    np.testing.assert_array_equal(picture.image[..., 0], stored.astype(np.float32) - 1024)
    np.testing.assert_allclose(picture.spacing, (2.5, 0.5, 0.75))
    np.testing.assert_array_equal(files.read_labels(folder), stored)

    assert files.output_suffix(picture) == '.nii.gz'
    files.write_labels(tmp_path / 'a.nii.gz', stored, picture)
    back = nibabel.load(tmp_path / 'a.nii.gz')
    for column, row, d in ((0, 0, 0), (5, 3, 4), (2, 1, 3)):
        assert back.dataobj[column, row, d] == stored[d, row, column]
        lps = np.array([-10 + 0.75 * column, 20 + 0.5 * row, 100 + 2.5 * d])
        place = back.affine @ (column, row, d, 1)
        np.testing.assert_allclose(place[:3], lps * (-1, -1, 1), rtol=1e-6)

    (folder / 'IM0').unlink()
    with pytest.raises(DataError, match='lacks a slice between IM4 and IM2'):
        files.read(folder)
    save_dicom(folder / 'IM0', stored[3], position=(-10.0, 20.0, 107.5), series='1.2.4')
    with pytest.raises(DataError, match='2 DICOM series'):
        files.read(folder)
    save_dicom(folder / 'IM0', stored[3], position=(-10.0, 20.0, 110.0))
    with pytest.raises(DataError, match='the same place'):
        files.read(folder)


@needs_pydicom
def test_single_dicom_files(tmp_path, rng):
    grey = rng.integers(0, 255, (4, 6), np.uint8)
    save_dicom(tmp_path / 'xray.dcm', grey, ImagerPixelSpacing=[0.2, 0.1])
    picture = files.read(tmp_path / 'xray.dcm')
    np.testing.assert_array_equal(picture.image, grey[None, ..., None])
    assert picture.spacing == (1.0, 0.2, 0.1)
    assert files.output_suffix(picture) == '.png'
    save_dicom(tmp_path / 'negative.dcm', 255 - grey, PhotometricInterpretation='MONOCHROME1')
    np.testing.assert_array_equal(files.read(tmp_path / 'negative.dcm').image, picture.image)
    colour = rng.integers(0, 255, (4, 6, 3), np.uint8)
    save_dicom(tmp_path / 'colour.dcm', colour)
    np.testing.assert_array_equal(files.read(tmp_path / 'colour.dcm').image[0], colour)
    # A coronal slice is kept whole, head up: columns to the left, rows to the feet.
    save_dicom(tmp_path / 'coronal', grey, position=(0, 0, 0), turned=(1, 0, 0, 0, 0, -1))
    picture = files.read(tmp_path / 'coronal')
    np.testing.assert_array_equal(picture.image, grey[None, ..., None])
    np.testing.assert_allclose(picture.spacing, (1.0, 0.5, 0.75))

    save_dicom(tmp_path / 'frames.dcm', np.tile(grey, (2, 1)), NumberOfFrames=2, Rows=4)
    with pytest.raises(DataError, match='several frames'):
        files.read(tmp_path / 'frames.dcm')
    save_dicom(tmp_path / 'deflated.dcm', grey, syntax='1.2.840.10008.1.2.1.99')
    with pytest.raises(DataError, match='deflated'):
        files.read(tmp_path / 'deflated.dcm')


@needs_pydicom
def test_what_lies_beside_the_slices_is_passed_over_by_name(tmp_path, rng, caplog):
    folder = tmp_path / 'p1'
    folder.mkdir()
    stored = rng.integers(0, 900, (3, 4, 6)).astype(np.uint16)
    for n, pixels in enumerate(stored):
        save_dicom(folder / f'IM{n:04}', pixels, position=(0, 0, 2.0 * n))
    save_no_picture(folder / 'RS.dcm', 'RTSTRUCT')
    save_no_picture(folder / 'report', 'SR')
    with caplog.at_level('INFO'):
        np.testing.assert_array_equal(files.read(folder).image[..., 0], stored)
    assert 'RS.dcm (RTSTRUCT), report (SR)' in caplog.text
    assert files.find(tmp_path) == {'p1': folder}


@needs_pydicom
@pytest.mark.parametrize(
    ('modality', 'tool'),
    [('SEG', 'segimage2itkimage of dcmqi, or by highdicom'), ('RTSTRUCT', 'plastimatch'),
     ('SR', 'leave it out')],
)  # fmt: skip
def test_dicom_without_a_picture_names_what_converts_it(tmp_path, modality, tool):
    frames = np.zeros((4, 6), np.uint8)
    for name in ('a.dcm', 'without'):
        if modality == 'SEG':
            save_dicom(tmp_path / name, frames, Modality='SEG', NumberOfFrames=2, Rows=2)
        else:
            save_no_picture(tmp_path / name, modality)
        for read in (files.read, files.read_labels):
            with pytest.raises(DataError, match=rf'of the kind {modality}.*{tool}') as caught:
                read(tmp_path / name)
            assert 'dcm2niix' not in str(caught.value)
    assert set(files.find(tmp_path)) == {'a', 'without'}  # alone: reading says what they are


def save_no_picture(path, modality):
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = '1.2.840.10008.5.1.4.1.1.481.3'
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SeriesInstanceUID, data.Modality = generate_uid(), modality
    data.save_as(path, enforce_file_format=True)


@needs_pydicom
def test_radiographs_are_pictures_and_series_are_volumes(tmp_path, rng):
    """By what the files say, with or without an ending; training and prediction alike."""
    grey = rng.integers(0, 255, (4, 6), np.uint8)
    for place in ('xrays', 'ct', 'one'):
        (tmp_path / place).mkdir()
    for n in range(3):
        save_dicom(tmp_path / f'film{n}.dcm', grey, series=f'1.2.{n}')
        save_dicom(tmp_path / 'xrays' / f'view{n}', grey, series='1.2.9')
        save_dicom(tmp_path / 'ct' / f'IM{n}', grey, series='1.2.8', position=(0, 0, 3.0 * n))
    save_dicom(tmp_path / 'one' / 'a.dcm', grey)
    (tmp_path / 'notes.txt').write_text('no DICM')
    ways = ['ct', 'film0', 'film1', 'film2', 'one', 'xrays/view0', 'xrays/view1', 'xrays/view2']
    found = files.find(tmp_path)
    assert list(found) == ways
    entries, others = files.gather_dicom(filter(files.is_dicom, tmp_path.rglob('*')), tmp_path)
    assert sorted(entries) == sorted(found.values())
    assert not others
    for path in found.values():
        assert files.read(path).image.shape == (3 if path.name == 'ct' else 1, 4, 6, 1)


@needs_pydicom
def test_slices_in_the_folder_itself_are_pictures_in_training_and_a_volume_as_input(
    tmp_path, rng, caplog
):
    for n in range(3):
        grey = rng.integers(0, 255, (4, 6), np.uint8)
        save_dicom(tmp_path / f'IM{n}.dcm', grey, position=(0, 0, 3.0 * n))
    assert list(files.find(tmp_path)) == ['IM0', 'IM1', 'IM2']
    assert 'put each series into a folder of its own' in caplog.text
    assert files.gather_dicom(tmp_path.iterdir(), tmp_path) == ([tmp_path], {})


@needs_pydicom
def test_packed_dicom_names_the_plug_in(tmp_path):
    """Not 'copy it again': the copy would need it too."""
    import pydicom

    grey = np.zeros((4, 6), np.uint8)
    for syntax, words in (
        (pydicom.uid.JPEGLosslessSV1, 'pip install pylibjpeg pylibjpeg-libjpeg'),
        (pydicom.uid.JPEGLSLossless, 'pip install pylibjpeg pylibjpeg-libjpeg'),
        (pydicom.uid.HTJ2KLossless, 'pip install pylibjpeg pylibjpeg-openjpeg'),
        (pydicom.uid.MPEG2MPML, 'gdcmconv --raw'),
    ):
        save_dicom(tmp_path / 'a.dcm', grey)
        data = pydicom.dcmread(tmp_path / 'a.dcm')
        data.PixelData = pydicom.encaps.encapsulate([b'\xff\xd8' + bytes(30)])
        data['PixelData'].VR = 'OB'
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(tmp_path / 'a.dcm', enforce_file_format=True)
        if words.startswith('pip') and pydicom.pixels.get_decoder(syntax).is_available:
            continue  # here it is installed
        with pytest.raises(DataError, match='packed as') as caught:
            files.read(tmp_path / 'a.dcm')
        assert words in str(caught.value)


# Which files there are.


def test_names_are_composed_as_most_systems_have_them(tmp_path):
    """macOS decomposes: the picture of one machine and the mask of another are of one name."""
    for form in ('NFC', 'NFD'):
        (tmp_path / form / 'übung').mkdir(parents=True)
        name = unicodedata.normalize(form, 'übung/Öl_é')
        (tmp_path / form / name).parent.mkdir(exist_ok=True)
        (tmp_path / form / f'{name}.png').touch()
    keys = [list(files.find(tmp_path / form)) for form in ('NFC', 'NFD')]
    assert keys[0] == keys[1] == [unicodedata.normalize('NFC', 'übung/Öl_é')]


def test_find(tmp_path):
    for name in ('b.nii.gz', 'sub/a.PNG', 'c.d.tif', 'notes.txt', '.hidden.png', 'ct/1.dcm'):
        path = tmp_path / 'data' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    root = tmp_path / 'data'
    found = files.find(root)
    assert list(found) == ['b', 'c.d', 'ct', 'sub/a']
    assert found['b'] == root / 'b.nii.gz'
    assert found['ct'] == root / 'ct'
    (root / 'sub' / 'b.png').touch()
    assert files.find(root)['sub/b'] == root / 'sub' / 'b.png'  # another one than b
    (root / 'b.png').touch()
    (tmp_path / 'outside.png').touch()
    (root / 'out.png').symlink_to(tmp_path / 'outside.png')
    (root / 'up').symlink_to(tmp_path)
    (root / 'loop').symlink_to(root)  # inside: not gone into, no fault
    with pytest.raises(DataError) as caught:
        files.find(root)
    lines = str(caught.value).split('\n  ')
    assert lines[0] == f'3 fault(s) in {root}:'
    assert sorted(line.split()[0].removeprefix(f'{root}/') for line in lines[1:]) == [
        'b.nii.gz',
        'out.png',
        'up',
    ]
    (tmp_path / 'nothing').mkdir()
    with pytest.raises(DataError, match='holds no picture'):
        files.find(tmp_path / 'nothing')
    with pytest.raises(DataError, match='is not a folder'):
        files.find(tmp_path / 'missing')


# Writing.


def test_flat_and_paged_results(tmp_path, rng):
    Image.fromarray(GREY).save(tmp_path / 'a.jpg')
    picture = files.read(tmp_path / 'a.jpg')
    for labels, mode in ((GREY, 'L'), (GREY.astype(int) + 300, 'I;16')):
        files.write_labels(tmp_path / 'm.png', labels[None], picture)
        with Image.open(tmp_path / 'm.png') as back:
            assert back.mode == mode
            np.testing.assert_array_equal(np.array(back), labels)
    prob = rng.random((1, 4, 5))
    files.write_probabilities(tmp_path / 'p.png', prob, picture)
    with Image.open(tmp_path / 'p.png') as back:
        np.testing.assert_allclose(np.array(back) / 65535, prob[0], atol=1e-5)

    pages = [Image.fromarray(GREY)] * 3
    pages[0].save(tmp_path / 'b.tif', save_all=True, append_images=pages[1:])
    picture = files.read(tmp_path / 'b.tif')
    for labels in (np.stack([GREY] * 3), np.stack([DEEP] * 3)):
        files.write_labels(tmp_path / 'm.tif', labels, picture)
        np.testing.assert_array_equal(files.read_labels(tmp_path / 'm.tif'), labels)
    prob = rng.random((3, 4, 5)).astype(np.float32)
    files.write_probabilities(tmp_path / 'p.tif', prob, picture)
    np.testing.assert_array_equal(files.read(tmp_path / 'p.tif').image[..., 0], prob)

    with pytest.raises(DataError, match=r'must end in \.tif'):
        files.write_labels(tmp_path / 'm.png', labels, picture)
    with pytest.raises(DataError, match='which has'):
        files.write_labels(tmp_path / 'm.tif', labels[1:], picture)
    with pytest.raises(DataError, match='do not fit'):
        files.write_labels(tmp_path / 'm.tif', labels.astype(int) - 70000, picture)


@contextlib.contextmanager
def files_of_at_most(size):
    """What a full disk is to a program: the write fails in its midst."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.npy', 'a.nii', 'a.nii.gz', 'folder'])
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, rng, name):
    if '.nii' in name and not has('nibabel'):
        pytest.skip('nibabel is not installed')
    values = rng.integers(0, 255, (1 if name == 'a.png' else 3, 200, 200), np.uint8)
    source = tmp_path / 'in' / name
    source.parent.mkdir()
    if name == 'folder':
        source.mkdir()
        for n, pixels in enumerate(values):
            Image.fromarray(pixels).save(source / f'{n}.png')
    elif '.nii' in name:
        save_nifti(source, values)
    elif name == 'a.npy':
        np.save(source, values)
    else:
        first, *rest = map(Image.fromarray, values)
        first.save(source, **({'save_all': True, 'append_images': rest} if rest else {}))
    picture = files.read(source)
    if name == 'a.npy':
        picture = picture._replace(image=values[..., None])
    labels, out = picture.image[..., 0], tmp_path / 'out' / name
    files.write_labels(out, labels, picture)
    before = {path: path.read_bytes() for path in out.parent.rglob('*') if path.is_file()}
    with files_of_at_most(8192), pytest.raises(DataError, match='can not be written'):
        files.write_labels(out, np.roll(labels, 1), picture)
    after = {path: path.read_bytes() for path in out.parent.rglob('*') if path.is_file()}
    assert after == before
    (tmp_path / 'file').touch()
    with pytest.raises(DataError, match='can not be written'):
        files.write_labels(tmp_path / 'file' / name, labels, picture)


# What is not to be trusted.


def nifti_bytes(dims, vox_offset=352.0, datatype=(16, 32), after=b''):
    head = bytearray(348)
    struct.pack_into('<i', head, 0, 348)
    struct.pack_into('<8h', head, 40, len(dims), *dims, *[1] * (7 - len(dims)))
    struct.pack_into('<2h', head, 70, *datatype)
    struct.pack_into('<8f', head, 76, *[1.0] * 8)
    struct.pack_into('<f', head, 108, vox_offset)
    head[344:348] = b'n+1\0'
    return bytes(head) + bytes(4) + after


def npy_bytes(shape):
    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + '\n'
    return b'\x93NUMPY\1\0' + struct.pack('<H', len(head)) + head.encode()


def png_of(width, height):
    """A PNG that says it is that large, black, and takes few bytes."""
    head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(10_000))
    chunks = b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in ((b'IHDR', head), (b'IDAT', body), (b'IEND', b''))
    )
    return b'\x89PNG\r\n\x1a\n' + chunks


def gif_bytes():
    """PIL knows some forty formats; ours are the four that are asked of it."""
    file = io.BytesIO()
    Image.fromarray(GREY).save(file, 'gif')
    return file.getvalue()


def many_pages(count):
    """Pages of 18 bytes, each only saying where the next is."""
    pages = b''.join(
        struct.pack('<HHHIII', 1, 256, 4, 1, 1, 8 + 18 * (i + 1)) for i in range(count)
    )
    return b'II*\0' + struct.pack('<I', 8) + pages


HOSTILE = {
    'empty.png': (b'', 'not a readable picture'),
    'text.png': (b'no picture', 'not a readable picture'),
    'bomb.png': (png_of(60_000, 60_000), 'limit is 2147483648 values'),
    'cut.png': (png_of(600, 600), 'not a readable picture'),
    'short.png': (png_of(12_000, 12_000), 'too short for its 1 x 12000 x 12000'),
    'script.tif': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not a readable'),
    'other.png': (gif_bytes(), 'not a readable picture'),
    'pages.tif': (many_pages(100), 'not a readable picture'),
    'empty.npy': (b'', 'not a readable array'),
    'vast.npy': (npy_bytes((2**20, 2**20, 2**10)), 'not a readable array'),
    'empty.nii': (b'', 'not a readable NIfTI'),
    'empty.nii.gz': (b'', 'not a readable NIfTI'),
    'text.nii.gz': (b'no gzip at all', 'not a readable NIfTI'),
    'vast.nii': (nifti_bytes((32767, 32767, 32767)), 'limit is 2147483648 values'),
    'short.nii': (nifti_bytes((1000, 1000, 100)), 'is shorter than'),
    'short.nii.gz': (gzip.compress(nifti_bytes((1000, 1000, 100))), 'is shorter than'),
    'cut.nii.gz': (gzip.compress(nifti_bytes((20, 20, 20), after=bytes(900))), 'not a readable'),
    'negative.nii': (nifti_bytes((-5, 5, 5), after=bytes(1000)), 'no size'),
    'offset.nii.gz': (
        gzip.compress(nifti_bytes((5, 5, 5), vox_offset=2.0**40, after=bytes(2**24))),
        'limit is 16777216',
    ),
    'nan.nii': (nifti_bytes((5, 5, 5), vox_offset=float('nan'), after=bytes(1000)), 'readable'),
    'kind.nii': (nifti_bytes((5, 5, 5), datatype=(999, 32), after=bytes(1000)), 'readable'),
    'empty.dcm': (b'', 'not a readable DICOM'),
    'text.dcm': (b'no dicom' * 40, 'not a readable DICOM'),
    'what.xyz': (b'', 'endings known'),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files_are_refused_before_they_cost(tmp_path, name):
    if '.nii' in name and not has('nibabel'):
        pytest.skip('nibabel is not installed')
    if '.dcm' in name and not has('pydicom'):
        pytest.skip('pydicom is not installed')
    content, message = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for function in (files.read, files.read_labels):
        with pytest.raises(DataError, match=message) as caught:
            function(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert '\n' not in str(caught.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 2**17, f'{grown} kB for a file of {len(content)} bytes'


def test_pages_and_memory_have_a_limit(tmp_path, monkeypatch):
    pages = [Image.fromarray(GREY)] * 6
    pages[0].save(tmp_path / 'a.tif', save_all=True, append_images=pages[1:])
    assert len(files.read(tmp_path / 'a.tif').image) == 6
    monkeypatch.setattr(files, 'MAX_SLICES', 5)
    with pytest.raises(DataError, match='more than 5 pages'):
        files.read(tmp_path / 'a.tif')
    monkeypatch.setattr(files, 'MAX_SLICES', 6)
    monkeypatch.setattr(files, 'MAX_VALUES', 6 * GREY.size - 1)
    with pytest.raises(DataError, match='limit is 119 values'):
        files.read(tmp_path / 'a.tif')
    monkeypatch.setattr(files, 'MAX_VALUES', 6 * GREY.size)
    monkeypatch.setattr(files, 'SMALL', 0)
    for free, fits in ((6 * GREY.size, True), (6 * GREY.size - 1, False)):
        monkeypatch.setattr(files, 'free_memory', lambda n=free: n)
        with contextlib.nullcontext() if fits else pytest.raises(DataError, match='are free'):
            files.read(tmp_path / 'a.tif')


def samples(folder):
    """A small sound file of every kind, with and without compression."""
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 255, (3, 9, 8), np.uint8), COLOUR
    for name, (picture, _, _) in FLAT.items():
        picture.save(folder / name)
    Image.fromarray(colour).save(folder / 'a.jpg')
    first, *rest = map(Image.fromarray, grey)
    for compression in ('raw', 'tiff_deflate', 'tiff_lzw', 'packbits'):
        path = folder / f'pages_{compression}.tif'
        first.save(path, save_all=True, append_images=rest, compression=compression)
    deep_colour_png(folder / 'deep_colour.png', rng.integers(0, 2**16, (4, 5, 3), np.uint16))
    deep_colour_tiff(folder / 'deep_colour.tif', rng.integers(0, 2**16, (4, 5, 3), np.uint16))
    np.save(folder / 'a.npy', rng.normal(size=(2, 3, 4, 1)))
    if has('nibabel'):
        save_nifti(folder / 'a.nii', grey)
        save_nifti(folder / 'a.nii.gz', grey.astype(np.float32))
        save_nifti(folder / 'second.nii', grey.astype(np.int16), second=True, slope=2.0)
    if has('pydicom') and has('nibabel'):
        save_dicom(folder / 'a.dcm', grey[0], position=(1, 2, 3), RescaleSlope=2)
        save_dicom(folder / 'b.dcm', colour)


@pytest.mark.filterwarnings('ignore')
def test_whatever_is_wrong_is_a_data_error(tmp_path):
    """Flipped bytes and cut ends, most of them near the start, where the headers are."""
    (tmp_path / 'good').mkdir()
    samples(tmp_path / 'good')
    rng = np.random.default_rng(1)
    messages, total = [], 0
    for path in sorted((tmp_path / 'good').iterdir()):
        files.read(path)
        good = path.read_bytes()
        bad = tmp_path / path.name
        for turn in range(80):
            data = bytearray(good)
            if turn % 4 == 0:
                del data[rng.integers(len(data)) :]
            else:
                ends = min(len(data), 400 if turn % 2 else len(data))
                for at in rng.integers(0, ends, rng.integers(1, 6)):
                    data[at] = rng.integers(256)
            bad.write_bytes(data)
            for function in (files.read, files.read_labels):
                total += 1
                try:
                    function(bad)
                except DataError as error:
                    messages.append(str(error))
    assert total > 150 * len(FLAT)
    assert 0.2 < len(messages) / total < 0.95  # neither everything nor nothing
    assert not any('\n' in message for message in messages)


@pytest.mark.parametrize(('package', 'name'), [('nibabel', 'a.nii.gz'), ('pydicom', 'a.dcm')])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b'anything')
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf'pip install "{package}'):
        files.read(tmp_path / name)


def test_nothing_waits_on_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    for path in (tmp_path / 'a.png', tmp_path / 'missing.png', tmp_path):
        with pytest.raises(DataError):
            files.read(path)


def test_a_closed_folder_is_a_fault_and_not_passed_over(tmp_path, monkeypatch):
    """Else a data set would shrink without a word."""
    (tmp_path / 'closed').mkdir()
    Image.fromarray(GREY).save(tmp_path / 'a.png')
    scandir = os.scandir

    def refuse(path):
        if Path(path) == tmp_path / 'closed':
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(DataError, match=r'closed can not be listed \(Permission denied\)'):
        files.find(tmp_path)
