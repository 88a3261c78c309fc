"""Volumes with a place in space: turned by quarters, and turned back."""

import gzip
import itertools
import struct

import numpy as np
import pytest

from pspnet_jax.data import formats
from pspnet_jax.runtime.errors import DataError
from tests.test_flat import has

needs_nibabel = pytest.mark.skipif(not has('nibabel'), reason='nibabel is not installed')


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
        picture = formats.read(path)
        # nibabel's own: axes towards right, front, head; ours: head, back, left.
        canonical = np.asarray(nibabel.as_closest_canonical(original).dataobj)
        expected = canonical[::-1, ::-1, :].transpose(2, 1, 0)
        np.testing.assert_array_equal(picture.image[..., 0], expected)
        sizes = (1.0, 2.0, 3.5)
        by_hand = [sizes[order.index(line)] for line in (2, 1, 0)]
        np.testing.assert_allclose(picture.spacing, by_hand, rtol=1e-6)

        labels = picture.image[..., 0] // 9
        out = tmp_path / 'labels.nii'
        formats.write_labels(out, labels, picture)
        back = nibabel.load(out)
        np.testing.assert_array_equal(np.asarray(back.dataobj), values // 9)
        assert back.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(back.affine, nibabel.load(path).affine)
        assert back.header.get_zooms() == nibabel.load(path).header.get_zooms()
        np.testing.assert_array_equal(formats.read_labels(out, like=picture), labels)


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
    picture = formats.read(tmp_path / 'a.nii')
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
    picture = formats.read(tmp_path / 'a.nii')
    assert picture.image.shape == (*seen, 1)
    assert picture.image[0, 0, 0, 0] == 7
    formats.write_labels(tmp_path / 'b.nii', picture.image[..., 0], picture)
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
        image = formats.read(path).image
        assert image.dtype == dtype, name
        expected = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
        expected = expected[::-1, ::-1].transpose(2, 1, 0)[..., None]
        np.testing.assert_allclose(image, expected, rtol=1e-6, err_msg=name)
    path = save_nifti(tmp_path / 'scaled.nii', whole, slope=0.25, intercept=-100.0)
    expected = whole[::-1, ::-1].transpose(2, 1, 0) * 0.25 - 100
    image = formats.read(path).image
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image[..., 0], expected)
    np.testing.assert_allclose(nibabel.load(path).get_fdata().max(), expected.max())


@needs_nibabel
def test_a_volume_is_unpacked_by_what_it_holds_not_by_its_name(tmp_path, rng):
    """Some tools write .nii.gz that are not packed, and others the other way round."""
    values = rng.integers(0, 255, (3, 4, 5), np.uint8)
    plain = save_nifti(tmp_path / 'a.nii', values)
    packed = save_nifti(tmp_path / 'b.nii.gz', values)
    expected = formats.read(plain).image
    for source, name in ((plain, 'c.nii.gz'), (packed, 'd.nii')):
        (tmp_path / name).write_bytes(source.read_bytes())
        np.testing.assert_array_equal(formats.read(tmp_path / name).image, expected)
    picture = formats.read(tmp_path / 'c.nii.gz')
    formats.write_labels(tmp_path / 'mask.nii.gz', expected[..., 0], picture)
    assert (tmp_path / 'mask.nii.gz').read_bytes()[:2] == b'\x1f\x8b'


@needs_nibabel
def test_what_is_no_number_becomes_0(tmp_path, caplog):
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    values[0, 0] = np.nan
    values[1, 1, 1] = -np.inf
    image = formats.read(save_nifti(tmp_path / 'a.nii', values)).image[..., 0]
    expected = np.where(np.isfinite(values), values, 0)[::-1, ::-1].transpose(2, 1, 0)
    np.testing.assert_array_equal(image, expected)
    huge = np.where(values > 30, 1e300, 1.0)  # beyond float32
    image = formats.read(save_nifti(tmp_path / 'huge.nii', huge)).image
    assert set(image.ravel().tolist()) == {0.0, 1.0}
    with pytest.raises(DataError, match='only NaN or infinity'):
        formats.read(save_nifti(tmp_path / 'b.nii', values * np.nan))


@needs_nibabel
def test_the_fourth_axis_is_channels(tmp_path, rng):
    values = rng.integers(0, 255, (3, 4, 5, 2), np.uint8)
    expected = values[::-1, ::-1].transpose(2, 1, 0, 3)
    for name, shaped in (('four', values), ('vector', values[:, :, :, None])):
        image = formats.read(save_nifti(tmp_path / f'{name}.nii', shaped)).image
        np.testing.assert_array_equal(image, expected)
    picture = formats.read(tmp_path / 'four.nii')
    formats.write_labels(tmp_path / 'labels.nii', expected[..., 0], picture)
    assert formats.read_labels(tmp_path / 'labels.nii', like=picture).shape == (5, 4, 3)
    with pytest.raises(DataError, match='2 values a voxel'):
        formats.read_labels(tmp_path / 'four.nii')
    with pytest.raises(DataError, match='dimensions'):
        formats.read(save_nifti(tmp_path / 'five.nii', np.zeros((2, 2, 2, 2, 2), np.uint8)))
    with pytest.raises(DataError, match='voxels of'):
        formats.read(save_nifti(tmp_path / 'complex.nii', np.zeros((2, 2, 2), np.complex64)))


@needs_nibabel
def test_spacing_is_in_millimetres(tmp_path):
    values = np.zeros((3, 4, 5), np.uint8)
    affine = np.diag([300.0, 400.0, 5000.0, 1.0])
    path = save_nifti(tmp_path / 'a.nii', values, affine, xyzt_units=3)  # micrometres
    np.testing.assert_allclose(formats.read(path).spacing, (5.0, 0.4, 0.3))


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
    picture = formats.read(tmp_path / 'a.nii')
    labels = np.full(picture.image.shape[:3], 700)
    formats.write_labels(tmp_path / 'b.nii', labels, picture)
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
    picture = formats.read(save_nifti(tmp_path / 'image.nii.gz', values, affine))
    plain = formats.read_labels(save_nifti(tmp_path / 'mask.nii', values, affine), like=picture)
    # The same voxels stored from the other side, and as floats: the same mask.
    other = affine @ np.array([[-1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    flipped = save_nifti(tmp_path / 'flipped.nii', values[::-1].astype(np.float32), other)
    np.testing.assert_array_equal(formats.read_labels(flipped, like=picture), plain)
    moved = affine.copy()
    moved[0, 3] += 1.0
    for name, mask, where, word in (
        ('moved', values, moved, 'apart'),
        ('cropped', values[1:], affine, 'different sizes'),
        ('coarse', values, affine @ np.diag([2, 1, 1, 1.0]), 'voxels of'),
    ):
        path = save_nifti(tmp_path / f'{name}.nii', mask, where)
        with pytest.raises(DataError, match=rf'{name}\.nii and .*image\.nii\.gz.*{word}'):
            formats.read_labels(path, like=picture)
    half = save_nifti(tmp_path / 'half.nii', values * np.float32(0.5), affine)
    with pytest.raises(DataError, match=r'half\.nii holds 0\.5, but labels are whole'):
        formats.read_labels(half)


@needs_nibabel
def test_a_mask_that_lacks_its_affine_is_told_to_take_the_images(tmp_path, rng):
    """Arrays that were saved alone: by nibabel without an affine or with 1, by SimpleITK."""
    import nibabel

    affine = affine_of((0, 1, 2), (1, 1, 1))
    values = rng.integers(0, 3, (4, 5, 6)).astype(np.uint8)
    picture = formats.read(save_nifti(tmp_path / 'image.nii.gz', values, affine))
    expected = formats.read_labels(save_nifti(tmp_path / 'true.nii', values, affine), like=picture)
    path = tmp_path / 'mask.nii'
    for without in (None, np.eye(4), np.diag([-1.0, -1.0, 1.0, 1.0])):
        nibabel.save(nibabel.Nifti1Image(values, without), path)
        with pytest.raises(DataError, match=r'mask\.nii has no position in space') as told:
            formats.read_labels(path, like=picture)
        assert 'resample' not in str(told.value)
        script = str(told.value).partition('python -c "')[2].rstrip('"')
        exec(compile(script, 'advice', 'exec'), {})  # what is to be pasted does it
        np.testing.assert_array_equal(formats.read_labels(path, like=picture), expected)
    plain = formats.read(save_nifti(tmp_path / 'plain.nii', values, np.eye(4)))
    with pytest.raises(DataError, match=r'plain\.nii has no position in space'):
        formats.read_labels(path, like=plain)


@needs_nibabel
def test_scaled_labels_come_out_whole(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4) * 10
    path = save_nifti(tmp_path / 'a.nii', values, slope=0.1, intercept=2.0)
    labels = formats.read_labels(path)
    np.testing.assert_array_equal(labels, (values // 10 + 2)[::-1, ::-1].transpose(2, 1, 0))


def nifti_bytes(dims, vox_offset=352.0, datatype=(16, 32), after=b''):
    head = bytearray(348)
    struct.pack_into('<i', head, 0, 348)
    struct.pack_into('<8h', head, 40, len(dims), *dims, *[1] * (7 - len(dims)))
    struct.pack_into('<2h', head, 70, *datatype)
    struct.pack_into('<8f', head, 76, *[1.0] * 8)
    struct.pack_into('<f', head, 108, vox_offset)
    head[344:348] = b'n+1\0'
    return bytes(head) + bytes(4) + after
