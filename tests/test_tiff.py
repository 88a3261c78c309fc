"""TIFFs as microscopes, ImageJ and satellites write them: every axis in its place, or refused."""

import struct
import sys

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.data import formats
from pspnet_jax.data.formats import flat, tiff
from pspnet_jax.runtime.errors import DataError

Z, C, H, W = 4, 3, 6, 7


@pytest.fixture
def tifffile():
    return pytest.importorskip('tifffile', reason='tifffile is not installed')


@pytest.fixture
def volume(rng):
    return rng.integers(0, 2**12, (Z, C, H, W)).astype(np.uint16)


def save_grey(path, pixels, photometric, order='<'):
    """By hand, as the specification has it: one strip, not packed."""
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    tags = [(256, 3, pixels.shape[1]), (257, 3, pixels.shape[0]), (258, 3, 8 * pixels.itemsize),
            (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1),
            (278, 3, pixels.shape[0]), (279, 4, len(data))]  # fmt: skip
    table = struct.pack(f'{order}H', len(tags))
    for tag, kind, value in tags:
        table += struct.pack(f'{order}HHI' + ('Hxx' if kind == 3 else 'I'), tag, kind, 1, value)
    head = {'<': b'II', '>': b'MM'}[order] + struct.pack(f'{order}HI', 42, 8 + len(data))
    path.write_bytes(head + data + table + bytes(4))
    return path


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_white_is_zero_images_are_as_shown_and_masks_as_stored(tmp_path, rng, dtype):
    """ImageJ's objects are the stored 255; a radiograph's bone is what viewers show as white."""
    top = np.iinfo(dtype).max
    stored = rng.integers(0, top, (H, W), dtype, endpoint=True)
    path = save_grey(tmp_path / 'a.tif', stored, photometric=0)
    np.testing.assert_array_equal(formats.read(path).image[0, ..., 0], top - stored)
    np.testing.assert_array_equal(formats.read_labels(path)[0], stored)
    plain = save_grey(tmp_path / 'b.tif', stored, photometric=1)
    np.testing.assert_array_equal(formats.read(plain).image[0, ..., 0], stored)
    np.testing.assert_array_equal(formats.read_labels(plain)[0], stored)


def test_one_bit_masks_are_as_shown_whatever_their_packing(tmp_path, rng):
    """Fax packing stores black as 1, which says nothing of what the mask means."""
    mask = rng.random((H, W)) > 0.5
    for name, options in {'plain': {}, 'fax': {'compression': 'group4'}}.items():
        Image.fromarray(mask).save(tmp_path / f'{name}.tif', **options)
        np.testing.assert_array_equal(formats.read_labels(tmp_path / f'{name}.tif')[0], mask)


def test_big_endian_white_is_zero_is_read_by_tifffile(tmp_path, rng, tifffile):
    stored = rng.integers(0, 2**16, (H, W), np.uint16)
    path = save_grey(tmp_path / 'a.tif', stored, photometric=0, order='>')
    np.testing.assert_array_equal(formats.read(path).image[0, ..., 0], 65535 - stored)
    np.testing.assert_array_equal(formats.read_labels(path)[0], stored)


KINDS = {'imagej': {'imagej': True}, 'ome': {'ome': True}, 'shaped': {'photometric': 'minisblack'}}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('axes', ['ZCYX', 'CYX', 'ZYX', 'TYX', 'TCYX', 'YX'])
def test_axes_are_those_of_the_metadata(tmp_path, volume, tifffile, kind, axes):
    values = volume[tuple(slice(None) if axis in axes.replace('T', 'Z') else 0 for axis in 'ZCYX')]
    tifffile.imwrite(tmp_path / 'a.tif', values, metadata={'axes': axes}, **KINDS[kind])
    expected = values if axes[0] in 'ZT' else values[None]
    expected = np.moveaxis(expected, 1, -1) if 'C' in axes else expected[..., None]
    np.testing.assert_array_equal(formats.read(tmp_path / 'a.tif').image, expected)


@pytest.mark.parametrize('kind', KINDS)
def test_frames_of_volumes_are_refused_and_so_are_several_images(tmp_path, volume, tifffile, kind):
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, np.stack([volume[:, 0]] * 2), metadata={'axes': 'TZYX'}, **KINDS[kind])
    with pytest.raises(
        DataError, match=r'a\.tif has the axes TZYX .* save each step of T as a separate f'
    ):
        formats.read(path)


def test_an_ome_file_of_several_images_is_refused(tmp_path, volume, tifffile):
    with tifffile.TiffWriter(tmp_path / 'a.ome.tif') as file:
        for image in volume[:2, 0]:
            file.write(image)
    with pytest.raises(DataError, match=r'holds 2 images: save each as its own file'):
        formats.read(tmp_path / 'a.ome.tif')


def test_an_ome_file_that_lacks_pages_is_refused(tmp_path, volume, tifffile):
    path = tmp_path / 'a.ome.tif'
    tifffile.imwrite(path, volume, metadata={'axes': 'ZCYX'}, ome=True)
    path.write_bytes(path.read_bytes().replace(b'SizeZ="4"', b'SizeZ="5"'))
    with pytest.raises(DataError, match=r'a\.ome\.tif'):
        formats.read(path)


def test_an_ome_file_does_not_lead_into_other_files(tmp_path, volume, tifffile):
    """Its metadata may name the files that hold its other planes: they may be anyone's."""
    tifffile.imwrite(tmp_path / 'secret.tif', volume[0, 0], description='', metadata=None)
    planes = ''.join(
        f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1"><UUID FileName="{name}">'
        f'urn:uuid:{c}</UUID></TiffData>'
        for c, name in enumerate(('a.ome.tif', 'secret.tif'))
    )
    note = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:0"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
        f'Type="uint16" SizeX="{W}" SizeY="{H}" SizeC="2" SizeZ="1" SizeT="1">{planes}</Pixels>'
        '</Image></OME>'
    )
    path = tmp_path / 'a.ome.tif'
    tifffile.imwrite(path, volume[1, 0], description=note, metadata=None)
    with tifffile.TiffFile(path) as file:
        assert len(file.series[0].pages) == 2  # tifffile alone goes there
    with pytest.raises(
        DataError, match=r'a\.ome\.tif has OME planes that are corrupted or in other files'
    ):
        formats.read(path)


def test_an_imagej_stack_with_one_directory_is_whole(tmp_path, volume, tifffile):
    """Beyond 4 GB ImageJ writes one directory, and the slices behind one another."""
    path = tmp_path / 'a.tif'
    slices = volume[:, 0]
    note = f'ImageJ=1.53\nimages={Z}\nslices={Z}\n'
    data = slices.astype('>u2').tobytes()
    tifffile.imwrite(path, slices[0], byteorder='>', description=note, metadata=None)
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[0]
    raw = path.read_bytes()
    path.write_bytes(raw[:start] + data)
    with Image.open(path) as picture:
        assert picture.n_frames == 1
    np.testing.assert_array_equal(formats.read(path).image[..., 0], slices)


@pytest.mark.parametrize(
    ('bands', 'options'),
    [
        (4, {'photometric': 'rgb', 'extrasamples': ['unspecified']}),
        (5, {'photometric': 'rgb', 'extrasamples': ['unspecified'] * 2}),
        (2, {'photometric': 'minisblack', 'planarconfig': 'contig'}),
        (5, {'photometric': 'minisblack', 'planarconfig': 'contig'}),
    ],
)
def test_every_band_is_a_channel(tmp_path, rng, tifffile, bands, options):
    values = rng.integers(0, 255, (H, W, bands), np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', values, **options)
    np.testing.assert_array_equal(formats.read(tmp_path / 'a.tif').image[0], values)


def test_bands_that_lie_one_after_another_are_channels(tmp_path, rng, tifffile):
    values = rng.integers(0, 255, (5, H, W), np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', values, photometric='minisblack', planarconfig='separate')
    image = formats.read(tmp_path / 'a.tif').image
    np.testing.assert_array_equal(image[0], np.moveaxis(values, 0, -1))


def test_a_fourth_band_that_is_said_to_be_alpha_is_dropped_with_a_warning(
    tmp_path, rng, tifffile, caplog, monkeypatch
):
    monkeypatch.setattr(flat, '_told', set())
    values = rng.integers(0, 255, (H, W, 4), np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', values, photometric='rgb', extrasamples=['unassalpha'])
    np.testing.assert_array_equal(formats.read(tmp_path / 'a.tif').image[0], values[..., :3])
    assert 'marks its fourth band, which has' in caplog.text
    assert 'ExtraSamples 0' in caplog.text


@pytest.mark.parametrize('dtype', [np.float16, np.float64, np.int32, np.uint32, np.int16])
def test_numbers_that_pillow_does_not_know(tmp_path, rng, tifffile, dtype):
    values = (rng.normal(size=(H, W)) * 500).astype(dtype)
    tifffile.imwrite(tmp_path / 'a.tif', values)
    image = formats.read(tmp_path / 'a.tif').image[0, ..., 0]
    np.testing.assert_array_equal(image, values.astype(np.float32))


def test_packed_bands(tmp_path, rng, tifffile):
    pytest.importorskip('imagecodecs', reason='imagecodecs is not installed')
    values = rng.integers(0, 255, (H, W, 5), np.uint8)
    for packing in ('deflate', 'lzw', 'zstd'):
        tifffile.imwrite(
            tmp_path / 'a.tif', values, photometric='minisblack', planarconfig='contig',
            compression=packing,
        )  # fmt: skip
        np.testing.assert_array_equal(formats.read(tmp_path / 'a.tif').image[0], values)
    grey = rng.integers(0, 255, (64, 64), np.uint8)
    tifffile.imwrite(tmp_path / 'b.tif', grey, compression='jpeg2000')
    with pytest.raises(DataError, match=r'compressed in a way \(34712\).* imagecodecs: python -c'):
        formats.read(tmp_path / 'b.tif')


def five_bands(path):
    """Without tifffile: a TIFF of 1 x 1 pixel with five grey bands of 16 bits."""
    tags = [(256, 3, 1), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8),
            (277, 3, 5), (278, 3, 1), (279, 4, 10)]  # fmt: skip
    table = struct.pack('<H', len(tags))
    for tag, kind, value in tags:
        table += struct.pack('<HHII', tag, kind, 1, value)
    path.write_bytes(b'II*\0' + struct.pack('<I', 18) + bytes(10) + table + bytes(4))


def test_a_sound_file_names_what_reads_it(tmp_path, monkeypatch):
    """Not 'copy it again': the copy would be the same."""
    five_bands(tmp_path / 'a.tif')
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    with pytest.raises(DataError, match=r'a\.tif has 5 band\(s\) of 16 bits') as caught:
        formats.read(tmp_path / 'a.tif')
    assert 'pip install "tifffile' in str(caught.value)
    assert 'copy' not in str(caught.value)


def test_axes_in_words():
    """The order of the axes is not the metadata's: D H W C."""
    values = np.arange(2 * 3 * 4 * 5 * 3).reshape(2, 3, 4, 5, 3)
    out = tiff.arrange(values, 'ZCYXS', 'a.tif')
    assert out.shape == (2, 4, 5, 9)
    for z, c, y, x, s in ((0, 0, 0, 0, 0), (1, 2, 3, 4, 2), (0, 1, 2, 3, 1)):
        assert out[z, y, x, 3 * c + s] == values[z, c, y, x, s]
    swapped = tiff.arrange(values.transpose(4, 3, 2, 1, 0), 'SXYCZ', 'a.tif')
    np.testing.assert_array_equal(swapped[..., [0, 3, 6, 1, 4, 7, 2, 5, 8]], out)
