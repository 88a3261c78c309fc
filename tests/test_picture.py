"""Whatever the format: arrays, sequences, results, and what is not to be trusted."""

import contextlib
import gzip
import os
import resource
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.data import formats
from pspnet_jax.data.formats import limits
from pspnet_jax.runtime.errors import DataError
from tests.test_dicom import save_dicom
from tests.test_flat import (
    COLOUR,
    DEEP,
    FLAT,
    GREY,
    deep_colour_png,
    deep_colour_tiff,
    gif_bytes,
    has,
)
from tests.test_nifti import nifti_bytes, save_nifti


def test_arrays(tmp_path, rng):
    values = rng.normal(size=(3, 4, 5, 2))
    for name, array, shape in (('d', values, (3, 4, 5, 2)), ('c', values[0], (1, 4, 5, 2))):
        np.save(tmp_path / f'{name}.npy', array)
        image = formats.read(tmp_path / f'{name}.npy').image
        np.testing.assert_array_equal(image, array.astype(np.float32).reshape(shape))
    labels = rng.integers(0, 4, (3, 4, 5))
    np.save(tmp_path / 'labels.npy', labels)
    np.testing.assert_array_equal(formats.read_labels(tmp_path / 'labels.npy'), labels)
    np.save(tmp_path / 'objects.npy', np.array([[{}]]), allow_pickle=True)
    with pytest.raises(DataError, match=r'objects\.npy is not a readable array'):
        formats.read(tmp_path / 'objects.npy')


def test_sequences_become_channels(tmp_path, rng):
    a, b = rng.integers(0, 255, (2, 6, 5), np.uint8)
    Image.fromarray(a).save(tmp_path / 'a.png')
    Image.fromarray(b.astype(np.uint16) * 100).save(tmp_path / 'b.png')
    Image.fromarray(b[:4]).save(tmp_path / 'c.png')
    one, two, other = (formats.read(tmp_path / f'{name}.png') for name in 'abc')
    both = formats.stack([one, two])
    assert both.image.dtype == np.uint16
    np.testing.assert_array_equal(both.image[0], np.dstack([a, b.astype(np.uint16) * 100]))
    with pytest.raises(DataError, match=r'c\.png and .*a\.png have different sizes'):
        formats.stack([one, other])
    far = [p._replace(spacing=s) for p, s in ((one, (3.0, 1.0, 1.0)), (two, (3.0, 1.0, 0.9)))]
    with pytest.raises(DataError, match=r'b\.png and .*a\.png have voxels of'):
        formats.stack(far)


# Writing.


def test_flat_and_paged_results(tmp_path, rng):
    Image.fromarray(GREY).save(tmp_path / 'a.jpg')
    picture = formats.read(tmp_path / 'a.jpg')
    for labels, mode in ((GREY, 'L'), (GREY.astype(int) + 300, 'I;16')):
        formats.write_labels(tmp_path / 'm.png', labels[None], picture)
        with Image.open(tmp_path / 'm.png') as back:
            assert back.mode == mode
            np.testing.assert_array_equal(np.array(back), labels)
    prob = rng.random((1, 4, 5))
    formats.write_probabilities(tmp_path / 'p.png', prob, picture)
    with Image.open(tmp_path / 'p.png') as back:
        np.testing.assert_allclose(np.array(back) / 65535, prob[0], atol=1e-5)

    pages = [Image.fromarray(GREY)] * 3
    pages[0].save(tmp_path / 'b.tif', save_all=True, append_images=pages[1:])
    picture = formats.read(tmp_path / 'b.tif')
    for labels in (np.stack([GREY] * 3), np.stack([DEEP] * 3)):
        formats.write_labels(tmp_path / 'm.tif', labels, picture)
        np.testing.assert_array_equal(formats.read_labels(tmp_path / 'm.tif'), labels)
    prob = rng.random((3, 4, 5)).astype(np.float32)
    formats.write_probabilities(tmp_path / 'p.tif', prob, picture)
    np.testing.assert_array_equal(formats.read(tmp_path / 'p.tif').image[..., 0], prob)

    with pytest.raises(DataError, match=r'must end in \.tif'):
        formats.write_labels(tmp_path / 'm.png', labels, picture)
    with pytest.raises(DataError, match='results have the size'):
        formats.write_labels(tmp_path / 'm.tif', labels[1:], picture)
    with pytest.raises(DataError, match='do not fit'):
        formats.write_labels(tmp_path / 'm.tif', labels.astype(int) - 70000, picture)


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
    picture = formats.read(source)
    if name == 'a.npy':
        picture = picture._replace(image=values[..., None])
    labels, out = picture.image[..., 0], tmp_path / 'out' / name
    formats.write_labels(out, labels, picture)
    before = {path: path.read_bytes() for path in out.parent.rglob('*') if path.is_file()}
    with files_of_at_most(8192), pytest.raises(DataError, match='can not be written'):
        formats.write_labels(out, np.roll(labels, 1), picture)
    after = {path: path.read_bytes() for path in out.parent.rglob('*') if path.is_file()}
    assert after == before
    (tmp_path / 'file').touch()
    with pytest.raises(DataError, match='can not be written'):
        formats.write_labels(tmp_path / 'file' / name, labels, picture)


# What is not to be trusted.


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
    'short.nii': (nifti_bytes((1000, 1000, 100)), 'is too short for'),
    'short.nii.gz': (gzip.compress(nifti_bytes((1000, 1000, 100))), 'is too short for'),
    'cut.nii.gz': (gzip.compress(nifti_bytes((20, 20, 20), after=bytes(900))), 'not a readable'),
    'negative.nii': (nifti_bytes((-5, 5, 5), after=bytes(1000)), 'invalid size'),
    'offset.nii.gz': (
        gzip.compress(nifti_bytes((5, 5, 5), vox_offset=2.0**40, after=bytes(2**24))),
        'limit is 16777216',
    ),
    'nan.nii': (nifti_bytes((5, 5, 5), vox_offset=float('nan'), after=bytes(1000)), 'readable'),
    'kind.nii': (nifti_bytes((5, 5, 5), datatype=(999, 32), after=bytes(1000)), 'readable'),
    'empty.dcm': (b'', 'not a readable DICOM'),
    'text.dcm': (b'no dicom' * 40, 'not a readable DICOM'),
    'what.xyz': (b'', 'known endings'),
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
    for function in (formats.read, formats.read_labels):
        with pytest.raises(DataError, match=message) as caught:
            function(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert '\n' not in str(caught.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 2**17, f'{grown} kB for a file of {len(content)} bytes'


def test_pages_and_memory_have_a_limit(tmp_path, monkeypatch):
    pages = [Image.fromarray(GREY)] * 6
    pages[0].save(tmp_path / 'a.tif', save_all=True, append_images=pages[1:])
    assert len(formats.read(tmp_path / 'a.tif').image) == 6
    monkeypatch.setattr(limits, 'MAX_SLICES', 5)
    with pytest.raises(DataError, match='more than 5 pages'):
        formats.read(tmp_path / 'a.tif')
    monkeypatch.setattr(limits, 'MAX_SLICES', 6)
    monkeypatch.setattr(limits, 'MAX_VALUES', 6 * GREY.size - 1)
    with pytest.raises(DataError, match='limit is 119 values'):
        formats.read(tmp_path / 'a.tif')
    monkeypatch.setattr(limits, 'MAX_VALUES', 6 * GREY.size)
    monkeypatch.setattr(limits, 'SMALL', 0)
    for free, fits in ((6 * GREY.size, True), (6 * GREY.size - 1, False)):
        monkeypatch.setattr(limits, 'free_memory', lambda n=free: n)
        with contextlib.nullcontext() if fits else pytest.raises(DataError, match='are free'):
            formats.read(tmp_path / 'a.tif')


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


@pytest.mark.stress
@pytest.mark.filterwarnings('ignore')
def test_whatever_is_wrong_is_a_data_error(tmp_path):
    """Flipped bytes and cut ends, most of them near the start, where the headers are."""
    (tmp_path / 'good').mkdir()
    samples(tmp_path / 'good')
    rng = np.random.default_rng(1)
    messages, total = [], 0
    for path in sorted((tmp_path / 'good').iterdir()):
        formats.read(path)
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
            for function in (formats.read, formats.read_labels):
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
        formats.read(tmp_path / name)


def test_nothing_waits_on_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    for path in (tmp_path / 'a.png', tmp_path / 'missing.png', tmp_path):
        with pytest.raises(DataError):
            formats.read(path)
