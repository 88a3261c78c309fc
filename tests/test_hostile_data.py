"""A file from a stranger is read or refused with one line: it can't do anything else."""

import ast
import contextlib
import gzip
import io
import os
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from pspnet_jax.data import formats, lgg
from pspnet_jax.data.formats import flat, limits
from pspnet_jax.runtime.errors import DataError, PspnetError
from tests.conftest import ROOT
from tests.stress import fuzz, fuzz_data, mutate
from tests.test_dicom import save_dicom
from tests.test_flat import GREY, has
from tests.test_nifti import nifti_bytes

NEEDS = {'nifti': 'nibabel', 'mask': 'nibabel', 'dicom': 'pydicom', 'dicom_series': 'pydicom'}
NEEDS |= {'video': 'av', 'microscopy': 'tifffile'}
needs_av = pytest.mark.skipif(not has('av'), reason='av is not installed')


class TooLate(BaseException):
    """Not an Exception, which decoders and ours would take for a damaged file."""


@contextlib.contextmanager
def within(seconds, megabytes=200):
    """Neither longer nor larger: what waits is interrupted, and fails."""

    def stop(*_):
        raise TooLate(f'not done in {seconds} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    assert grown < megabytes, f'{grown:.0f} MB were taken'


def refusal(function, *arguments, **options) -> str:
    """The message, in time and memory, of a PspnetError that has one line a fault."""
    with within(10), pytest.raises(PspnetError) as caught:
        function(*arguments, **options)
    assert not fuzz.fault_of(caught.value)
    return str(caught.value)


# Any change at all.


@pytest.mark.stress
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', fuzz_data.READERS)
def test_a_reader_refuses_or_reads_whatever_the_bytes(tmp_path, monkeypatch, name):
    alone = ('video', 'microscopy')
    if name in NEEDS and not (has(NEEDS[name]) and (name in alone or has('nibabel'))):
        pytest.skip(f'{NEEDS[name]} is not installed')
    for place in fuzz.FOLDERS:
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / 'cwd')
    seeds, read = fuzz_data.READERS[name]
    valid, case = mutate.load(seeds(tmp_path / 'seeds')), tmp_path / 'deep' / 'case'
    for seed in valid:
        read(mutate.write(seed, fuzz.fresh(case)))
    refused = 0
    for number in range(200):
        path = mutate.write(
            mutate.change(valid, random.Random(f'{name} {number}')), fuzz.fresh(case)
        )
        with within(20, megabytes=1024):
            kind, wrong = fuzz.attempt(read, path)
        refused += kind == 'refused'
        again = f'number {number} of {name}: {wrong}'
        assert kind in ('accepted', 'refused'), again
        assert not fuzz.left_behind(tmp_path), again
    assert refused > 34, 'the changes do no harm, so nothing was tested'


@pytest.mark.stress
def test_the_fuzzer_sees_what_goes_wrong(tmp_path):
    """An error, a crash, silence, a file and memory, each from the one byte that asks for it."""
    (tmp_path / 'bad.py').write_text(f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.stress import fuzz
from pspnet_jax.runtime.errors import DataError

def seeds(folder):
    for n in range(7):
        (folder / str(n)).touch()
    return sorted(folder.iterdir())

def read(path):
    what = int(path.name) if asked else 0
    if what == 1: raise KeyError('x')
    if what == 2: os._exit(3)
    if what == 3: time.sleep(60)
    if what == 4: Path('stray').touch()
    if what == 5: bytearray(300 * 2**20)[::4096] = bytes(300 * 256)
    if what == 6: raise DataError('refused')

def change(valid, rng):
    global asked
    asked = True
    return valid[rng.randrange(7)]

asked, fuzz.mutate.change, fuzz.READERS['bad'] = False, change, (seeds, read)
if __name__ == '__main__':
    options = dict(seed=52, inputs=7, first=0, limit=5, memory=100, keep=Path('kept'))
    print(fuzz.run('bad', **options))
""")
    done = subprocess.run(
        [sys.executable, 'bad.py'], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    counts, peak = ast.literal_eval(done.stdout or done.stderr)
    assert counts == {kind: 2 if kind == 'other_errors' else 1 for kind in fuzz.KINDS}
    assert peak > 300
    kept = [path.read_text() for path in (tmp_path / 'kept').glob('*/why.txt')]
    assert len(kept) == 5
    assert any('MB were taken' in why for why in kept)


@pytest.mark.stress
@pytest.mark.skipif(not has('atheris'), reason='atheris is not installed')
def test_the_guided_fuzzer_finds_what_chance_would_not(tmp_path):
    """Four bytes that must all be right: one input in four thousand millions."""
    (tmp_path / 'bad.py').write_text(f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import atheris
from tests.stress import fuzz

def seeds(folder):
    (folder / 'a').write_bytes(bytes(8))
    return [folder / 'a']

@atheris.instrument_func
def read(path):
    if int.from_bytes(path.read_bytes()[:4], 'little') == 0x676F6F64:
        raise KeyError('x')

fuzz.READERS['bad'] = (seeds, read)
if __name__ == '__main__':
    options = dict(seed=0, inputs=4000, first=0, limit=20, memory=100, keep=Path('kept'))
    print(fuzz.run('bad', guided=True, **options)[0])
""")
    done = subprocess.run(
        [sys.executable, 'bad.py'], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    counts = ast.literal_eval(done.stdout or done.stderr)
    assert counts['other_errors'] > 0
    assert counts['accepted'] + counts['other_errors'] == 4000
    kept = next((tmp_path / 'kept').glob('bad_0_*'))
    assert (kept / 'a').read_bytes()[:4] == b'doog'


# What a header says.


def chunked_png(width, height, *chunks):
    head = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    parts = ((b'IHDR', head), *chunks, (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        for kind, data in parts
    )


def bmp(width, height):
    info = struct.pack('<IiiHHIIiiII', 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b'BM' + struct.pack('<IHHI', 54, 0, 0, 54) + info


def tiff(entries, more=b''):
    """One directory of (tag, type, count, value), the next one nowhere."""
    body = b''.join(struct.pack('<HHII', *entry) for entry in sorted(entries))
    return b'II*\0' + struct.pack('<IH', 8, len(entries)) + body + bytes(4) + more


def grey_tiff(width, height, compression, more=b'', **tags):
    named = {'width': (256, 4), 'height': (257, 4), 'tile': (322, 4), 'rows': (278, 4)}
    entries = [(258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1), (273, 4, 1, 200)]
    entries += [(277, 3, 1, 1), (279, 4, 1, len(more))]
    for name, value in {'width': width, 'height': height, 'rows': height, **tags}.items():
        entries.append((named[name][0], named[name][1], 1, value))
    head = tiff(entries)
    return head.ljust(200, b'\0') + more


def jpeg(width, height):
    file = io.BytesIO()
    Image.fromarray(GREY).save(file, 'jpeg')
    data = bytearray(file.getvalue())
    at = data.index(b'\xff\xc0')
    data[at + 5 : at + 9] = struct.pack('>HH', height, width)
    return bytes(data)


def webp(width, height):
    """An extended header alone: a canvas of that size, and a picture of another."""
    file = io.BytesIO()
    Image.fromarray(GREY).convert('RGB').save(file, 'webp', lossless=True)
    picture = file.getvalue()[12:]
    head = struct.pack('<I', 0) + (width - 1).to_bytes(3, 'little')
    head += (height - 1).to_bytes(3, 'little')
    body = b'WEBPVP8X' + struct.pack('<I', 10) + head + picture
    return b'RIFF' + struct.pack('<I', len(body)) + body


class Harm:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return os.mkdir, ('harm',)


def npy(values):
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def npz():
    file = io.BytesIO()
    np.savez_compressed(file, a=np.zeros(2**20))
    return file.getvalue()


def npy_saying(description):
    head = description.encode().ljust(117) + b'\n'
    return b'\x93NUMPY\1\0' + struct.pack('<H', len(head)) + head


ZEROS = bytes(2**26)
EXTENDED = nifti_bytes((4, 5, 6), after=b'')[:348] + b'\1\0\0\0'
HOSTILE = {
    'claims.tif': (grey_tiff(60_000, 60_000, 8, zlib.compress(ZEROS)), 'limit is 2147483648'),
    'packed.tif': (grey_tiff(30_000, 30_000, 8, zlib.compress(bytes(999))), 'too short for its'),
    'claims.bmp': (bmp(2**31 - 1, 2**31 - 1), 'exceeds limit'),
    'short.bmp': (bmp(20_000, 20_000), 'too short for its 1 x 20000 x 20000 x 3'),
    'claims.jpg': (jpeg(65_500, 65_500), 'limit is 2147483648 values: cut it up'),
    'short.jpg': (jpeg(40_000, 40_000), 'too short for its'),
    'claims.webp': (webp(16_384, 16_384), 'is not a readable picture|too short'),
    'text.png': (
        chunked_png(2, 2, (b'zTXt', b'a\0\0' + zlib.compress(ZEROS, 9)), (b'IDAT', b'')),
        'not a readable picture',
    ),
    'profile.png': (
        chunked_png(2, 2, (b'iCCP', b'a\0\0' + zlib.compress(ZEROS, 9)), (b'IDAT', b'')),
        'not a readable picture',
    ),
    'pickle.npy': (npy(np.array([Harm()])), 'not a readable array'),
    'plain.npy': (pickle.dumps(Harm()), 'not a readable array'),
    'zip.npy': (npz(), 'not a readable array'),
    'code.npy': (npy_saying("{'descr': __import__('os').mkdir('harm')}"), 'not a readable array'),
    'deep.npy': (npy_saying('(' * 110), 'not a readable array'),
    'negative.npy': (
        npy_saying("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 5), }"),
        'not a readable array|invalid size',
    ),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', HOSTILE)
def test_a_header_is_not_believed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, message = HOSTILE[name]
    assert len(content) < 2**18
    (tmp_path / name).write_bytes(content)
    for function in (formats.read, formats.read_labels, lgg.read_image):
        refused = refusal(function, tmp_path / name)
        assert re.search(message, refused) or function is lgg.read_image, refused
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(not has('nibabel'), reason='nibabel is not installed')
def test_what_lies_behind_the_header_of_a_nifti_file_is_not_unpacked(tmp_path):
    """An extension that says it has 1 GB, and 512 MB of zeros that are there."""
    head = nifti_bytes((4, 5, 6), vox_offset=2.0**20)[:348] + b'\1\0\0\0'
    with gzip.open(tmp_path / 'a.nii.gz', 'wb', compresslevel=1) as file:
        file.write(head + struct.pack('<ii', 2**30, 6))
        for _ in range(8):
            file.write(ZEROS)
    assert (tmp_path / 'a.nii.gz').stat().st_size < 2**22
    with within(10):
        assert not formats.read(tmp_path / 'a.nii.gz').image.any()


@pytest.mark.skipif(not has('pydicom') or not has('nibabel'), reason='pydicom is not installed')
@pytest.mark.parametrize(
    ('says', 'message'),
    [
        ({'Rows': 65535, 'Columns': 65535}, 'limit is 2147483648'),
        ({'Rows': 40_000, 'Columns': 40_000}, 'too short for its'),
        ({'BitsAllocated': 65535}, 'not a readable DICOM'),
        ({'NumberOfFrames': 2**31 - 1}, 'several frames'),
        (
            {'RescaleSlope': 'nan', 'RescaleIntercept': 'inf'},
            'not a readable DICOM|only NaN or infinity',
        ),
        ({'PixelSpacing': ['1e308', '1e308']}, 'not a readable DICOM|has a singular affine'),
        ({'PhotometricInterpretation': 'A\nB\x1b[31m'}, 'not a readable DICOM'),
    ],
)
@pytest.mark.filterwarnings('ignore')
def test_a_dicom_header_is_not_believed(tmp_path, says, message):
    save_dicom(tmp_path / 'a.dcm', GREY, position=(0, 0, 0), **says)
    assert re.search(message, refusal(formats.read, tmp_path / 'a.dcm'))


def test_sizes_that_slides_and_scans_have_pass(tmp_path, monkeypatch):
    """20,000 x 20,000 RGB, which a png of 40 kB can not hold, and 512 x 512 x 1,000 of CT."""
    monkeypatch.setattr(limits, 'free_memory', lambda: 2**34)
    path = tmp_path / 'a.png'
    path.write_bytes(chunked_png(20_000, 20_000, (b'IDAT', b'')))
    assert flat.size(path) == (20_000, 20_000)
    with Image.open(path) as picture:
        flat.check(picture, path, 3, 10**9)
        with pytest.raises(DataError, match='too short'):
            flat.check(picture, path, 3, 10**5)
    limits.check_size(path, (512, 512, 1000), 2)


def test_scans_of_a_jpeg_have_a_limit(tmp_path):
    """Each costs the whole picture's time and may take a few bytes."""
    Image.fromarray(GREY).save(tmp_path / 'a.jpg', progressive=True)
    data = (tmp_path / 'a.jpg').read_bytes()
    assert 1 < data.count(b'\xff\xda') < 20
    formats.read(tmp_path / 'a.jpg')
    last = data[data.rindex(b'\xff\xda') : -2]
    (tmp_path / 'b.jpg').write_bytes(data[:-2] + 200 * last + data[-2:])
    with Image.open(tmp_path / 'b.jpg') as picture:
        picture.load()  # Pillow goes through them all
    assert 'scans, but the limit is 100' in refusal(formats.read, tmp_path / 'b.jpg')


# Pages.


def test_pages_that_lead_in_a_circle_end(tmp_path):
    first, *rest = [Image.fromarray(GREY + n) for n in range(3)]
    first.save(tmp_path / 'a.tif', save_all=True, append_images=rest)
    data = bytearray((tmp_path / 'a.tif').read_bytes())
    places, at = [], 4
    while place := struct.unpack_from('<I', data, at)[0]:
        places.append(place)
        at = place + 2 + 12 * struct.unpack_from('<H', data, place)[0]
    assert len(places) == 3
    for back in places:
        struct.pack_into('<I', data, at, back)
        (tmp_path / 'b.tif').write_bytes(data)
        with within(5):
            pages = formats.read(tmp_path / 'b.tif').image[..., 0]
        np.testing.assert_array_equal(pages, np.stack([GREY + n for n in range(3)]))


def test_pages_that_lie_on_one_another_are_refused_at_once(tmp_path):
    """16,000 directories of 65,535 entries, all sound, in 1 MB: Pillow reads them in hours.

    A row of 12 bytes is the number of entries of the directory that begins there, and an entry
    but for its last two bytes, which are the next row's first; or where the next directory is.
    """
    pages, entries = 16_000, 65_535
    tags = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 1}
    rows = [struct.pack('<HHHIH', entries, tag, 3, 1, value) for tag, value in tags.items()]
    data = bytearray(b'II*\0' + struct.pack('<I', 8) + b''.join(rows) * 9061)
    for n in range(pages):
        struct.pack_into('<I', data, 8 + 12 * (n + entries) + 2, 8 + 12 * (n + 1))
    (tmp_path / 'a.tif').write_bytes(data)
    with Image.open(tmp_path / 'a.tif') as picture:
        picture.seek(3)  # sound pages, as far as one looks
    assert 'overlapping pages' in refusal(formats.read, tmp_path / 'a.tif')
