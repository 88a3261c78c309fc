"""Slices, volumes and their intensity scale."""

import contextlib
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import ndimage

from pspnet_jax.data import phantom, pipeline, volumes
from pspnet_jax.data.formats import limits
from pspnet_jax.models.weights.tables import CAFFE, IMAGENET
from pspnet_jax.runtime.errors import DataError
from pspnet_jax.training import placement
from tests.conftest import ROOT


def two_volumes(rng):
    return [
        volumes.Volume(
            name,
            rng.integers(0, 255, (depth, 8, 6, 3), np.uint8),
            rng.integers(0, 2, (depth, 8, 6)).astype(np.uint8),
            np.arange(1, depth + 1),
            np.ones((4, 3), np.float32),
        )
        for name, depth in (('a', 3), ('b', 5))
    ]


def test_slices_of_volumes_are_the_volumes(rng):
    there = two_volumes(rng)
    slices = volumes.from_volumes(there)
    back = list(volumes.iterate_volumes(slices))
    for one, other in zip(there, back, strict=True):
        assert one.patient == other.patient
        for field in ('image', 'mask', 'slices'):
            assert (getattr(one, field) == getattr(other, field)).all()


def test_select_keeps_a_patient_whole(rng):
    there = two_volumes(rng)
    part = volumes.select(volumes.from_volumes(there), ['b'])
    (only,) = volumes.iterate_volumes(part)
    assert (only.image == there[1].image).all()
    assert volumes.describe(part) == '1 case, 5 images, 5 with a structure'


def test_normalize_is_a_clipped_z_score(rng):
    image = rng.gamma(2, 20, (4, 32, 32, 2)).clip(0, 255).astype(np.uint8)
    intensity = volumes.measure_intensity(image)
    for c in range(2):
        values = image[..., c].astype(np.float64)
        clipped = values.clip(*np.percentile(values, (10, 99)))
        expected = (clipped - clipped.mean()) / clipped.std()
        np.testing.assert_allclose(volumes.normalize(image, intensity)[..., c], expected, atol=1e-4)


def test_the_scale_of_a_scan_does_not_matter(rng):
    """MRI has no unit: twice as bright is the same picture."""
    image = rng.integers(0, 120, (3, 16, 16, 3)).astype(np.uint8)
    once, twice = image, 2 * image
    np.testing.assert_allclose(
        volumes.normalize(once, volumes.measure_intensity(once)),
        volumes.normalize(twice, volumes.measure_intensity(twice)),
        atol=1e-5,
    )


# One scale for all images, of pretrained weights.


@pytest.mark.parametrize(
    ('low', 'high', 'dtype'),
    [(0, 4080, np.uint16), (-1020, 3060, np.float32), (0, 1, np.float32), (900, 1155, np.uint16)],
    ids=['12 bits', 'CT', '0 to 1', 'a few of many'],
)
@pytest.mark.parametrize('weights', [IMAGENET, CAFFE])
def test_other_numbers_of_the_same_picture_are_normalised_to_the_same(
    rng, low, high, dtype, weights
):
    eight = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    other = (low + eight / 255 * (high - low)).astype(dtype)
    scale = np.array([[low] * 3, [high] * 3])
    np.testing.assert_allclose(
        volumes.normalize(other, weights.intensity(3, scale)),
        volumes.normalize(eight, weights.intensity(3)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_what_lies_beyond_the_range_is_not_lost_in_it():
    """A small lesion that is brighter than 99.5 % of all pixels stays brighter than they."""
    scale = np.array([[100.0], [200.0]])
    values = np.array([[[[100.0], [200.0], [250.0], [300.0], [9e9]]]], np.float32)
    found = volumes.normalize(values, IMAGENET.intensity(1, scale)).ravel() * 58.395 + 123.675
    np.testing.assert_allclose(found, [0, 255, 382.5, 510, 510], rtol=1e-4)


def test_the_range_is_percentiles_and_of_flat_channels_all_there_is(rng):
    image = rng.normal(0, 400, (5, 64, 64, 2)).astype(np.float32)
    expected = np.percentile(image.reshape(-1, 2), (0.5, 99.5), axis=0)
    np.testing.assert_allclose(volumes.measure_range(image), expected, rtol=1e-5)
    image[...] = 7
    image[0, 0, 0] = (3, 900)
    np.testing.assert_array_equal(volumes.measure_range(image), [[3, 7], [7, 900]])


def slices_of(**images):
    """A slice a patient."""
    return volumes.from_volumes(
        [
            volumes.Volume(
                name,
                image,
                np.zeros(image.shape[:3], np.uint8),
                np.arange(len(image)),
                volumes.measure_intensity(image),
            )
            for name, image in images.items()
        ]
    )


def test_the_range_of_all_is_the_median_patients(rng):
    sound = {
        f'p{n}': rng.integers(0, 4096, (1, 64, 64, 1)).astype(np.uint16) + np.uint16(n)
        for n in range(9)
    }
    odd = {**sound, 'metal': np.full((1, 64, 64, 1), 65535, np.uint16)}
    ranges = [volumes.measure_range(image) for image in sound.values()]
    found = volumes.joint_range(slices_of(**odd))
    np.testing.assert_allclose(found, np.median(ranges, axis=0), atol=20)
    assert volumes.joint_range(slices_of(a=np.zeros((1, 8, 8, 3), np.uint8))) is None
    flat = slices_of(a=np.full((1, 8, 8, 1), 5, np.uint16), b=np.full((1, 8, 8, 1), 5, np.uint16))
    np.testing.assert_array_equal(volumes.joint_range(flat), [[5], [6]])


def test_images_of_8_bits_and_of_more_have_no_scale_in_common():
    mixed = slices_of(a=np.zeros((1, 8, 8, 1), np.uint8), b=np.full((1, 8, 8, 1), 900, np.uint16))
    with pytest.raises(
        DataError,
        match=r'1 of 2 patients have 8-bit images \(a\), the others do not \(b\): '
        r'set --config\.data\.normalize=volume',
    ):
        volumes.joint_range(mixed)
    deep, eight = volumes.select(mixed, ['b']), volumes.select(mixed, ['a'])
    np.testing.assert_array_equal(volumes.joint_range(deep), [[900], [901]])
    for part, other in ((deep, eight), (eight, deep)):
        with pytest.raises(DataError, match='1 of 2 patients have 8-bit images'):
            volumes.joint_range(part, [other])


FIXED = IMAGENET.intensity(1)
DEEP = IMAGENET.intensity(1, np.array([[0.0], [4000.0]]))


@pytest.mark.parametrize(
    ('image', 'intensity', 'words'),
    [
        (np.uint8([0, 1]), FIXED, ''),
        (np.uint16([0, 255]), FIXED, ''),
        (np.int64([3, 200]), FIXED, ''),
        (np.float32([0, 200]), FIXED, ''),
        (np.float32([0, 0]), FIXED, ''),
        (
            np.uint16([0, 256]),
            FIXED,
            'x holds uint16 values from 0 to 256, but the run was trained on',
        ),
        (np.float32([-1, 3]), FIXED, 'float32 values from -1 to 3'),
        (np.float32([0, 1]), FIXED, r'float32 values from 0 to 1, .* \(black 0, white 255\)'),
        (np.float32([0, 3.5]), FIXED, 'float32 values from 0 to 3.5'),
        (np.uint16([0, 200]), DEEP, ''),
        (np.float32([-9, 1e6]), DEEP, ''),
        (np.uint8([0, 200]), DEEP, 'x has 8 bits, but the run was trained on .* about 0 to 4000'),
    ],
)
def test_an_image_of_another_kind_is_refused(image, intensity, words):
    image = image.reshape(1, 1, 2, 1)
    said = pytest.raises(DataError, match=words) if words else contextlib.nullcontext()
    with said:
        volumes.check_kind(image, intensity, 'x')


def test_a_constant_channel_is_zero_not_nan():
    image = np.full((2, 4, 4, 3), 7, np.uint8)
    assert (volumes.normalize(image, volumes.measure_intensity(image)) == 0).all()


def test_slices_in_memory_are_decoded_once(monkeypatch):
    slices = phantom.load(volumes=3, slices=4, size=32, seed=0)
    reads = []

    def read(key):
        reads.append(key)
        return slices.read(key)

    slow = dataclasses.replace(slices, read=read)
    kept = volumes.in_memory(slow)
    for _ in range(2):
        for key in slices.key:
            for a, b in zip(kept.read(int(key)), slices.read(int(key)), strict=True):
                assert (a == b).all()
    assert len(reads) == len(slices) + 1  # the first one is also measured

    free = 2 * 12 * 32 * 32 * 4  # bytes: just enough, then just too few
    for bytes_free, same in ((free, False), (free - 1, True)):
        monkeypatch.setattr(volumes, 'free_memory', lambda n=bytes_free: n)
        assert (volumes.in_memory(slow) is slow) == same


def test_free_memory_is_the_containers_and_the_ulimits(tmp_path, monkeypatch):
    """Of the groups above, too; pages of files that can be dropped count as free."""
    monkeypatch.setattr(limits, 'GROUPS', tmp_path)
    monkeypatch.setattr(limits, 'OWN_GROUP', tmp_path / 'own')
    machine = volumes.free_memory()
    (tmp_path / 'own').write_text('12:cpu:/x\n0::/slurm/job\n')
    job = tmp_path / 'slurm' / 'job'
    job.mkdir(parents=True)
    for folder, limit, used in ((job, 'max', 70), (job.parent, 5 << 20, 3 << 20)):
        (folder / 'memory.max').write_text(f'{limit}\n')
        (folder / 'memory.current').write_text(f'{used}\n')
        (folder / 'memory.stat').write_text('anon 5\ninactive_file 1048576\n')
    assert volumes.free_memory() == 3 << 20
    (job / 'memory.max').write_text(str(1 << 20))
    assert volumes.free_memory() == (2 << 20) - 70
    older = tmp_path / 'memory' / 'docker'
    older.mkdir(parents=True)
    (tmp_path / 'own').write_text('4:memory:/docker\n')
    (older / 'memory.limit_in_bytes').write_text('5000')
    (older / 'memory.usage_in_bytes').write_text('6000')
    (older / 'memory.stat').write_text('')
    assert volumes.free_memory() == 0
    (tmp_path / 'own').unlink()
    assert volumes.free_memory() == pytest.approx(machine, rel=0.2)
    code = 'import resource; from pspnet_jax.data import volumes\n'
    code += 'resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34)); print(volumes.free_memory())'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, check=True)
    assert 0 < int(done.stdout) < 2**34


@pytest.mark.parametrize(('cells', 'size'), [(4, 16), (3, 6), (3, 9), (7, 7), (5, 8), (9, 4)])
def test_a_cell_takes_the_pixel_nearest_to_its_centre_and_nothing_moves(cells, size):
    taken = volumes.centres(cells, size)
    apart = (taken + 0.5) / size - (np.arange(cells) + 0.5) / cells  # of the whole side
    pixels = (np.arange(size) + 0.5) / size
    nearest = np.abs(pixels - (np.arange(cells)[:, None] + 0.5) / cells).min(1)
    np.testing.assert_allclose(np.abs(apart), nearest, atol=1e-12)
    if cells % 2 == 0:  # always the upper of two is half a pixel: 1/2 / size
        assert abs(apart.mean()) < 1e-12
        np.testing.assert_array_equal(size - 1 - taken[::-1], taken)  # mirror images stay so
    assert abs(apart.mean()) < 0.5 / size / 2 or cells < 4


def test_shrunk_labels_lie_where_the_shrunk_image_has_them(rng):
    """Of squares anywhere, at an even ratio: their centre of mass moves by nothing on average."""
    moves = []
    for top, left in rng.integers(4, 100, (60, 2)):
        mask = np.zeros((128, 128), np.uint8)
        mask[top : top + 21, left : left + 19] = 1
        small = volumes.resize_labels(mask, (32, 32))
        image = volumes.resize_image(mask[..., None].astype(np.float32), (32, 32))[..., 0]
        of_labels, of_image = (
            np.array(ndimage.center_of_mass(x.astype(np.float64))) for x in (small, image)
        )
        moves.append(4 * (of_labels - of_image))
    assert np.abs(np.mean(moves, axis=0)).max() < 0.2  # pixels of the large one; it was 0.5


def test_scans_and_spacing_go_with_the_slices(rng):
    a, b = two_volumes(rng)
    a = a._replace(spacing=(5.0, 0.5, 0.5), scan=np.array([0, 0, 1]))
    slices = volumes.from_volumes([a, b])
    for part, (one, other) in (
        (slices, (a, b)),
        (volumes.select(slices, ['a', 'b']), (a, b)),
    ):
        first, second = volumes.iterate_volumes(part)
        assert first.spacing == one.spacing
        assert second.spacing is other.spacing is None
        assert [rows.tolist() for rows in volumes.scans(first.scan, 3)] == [[0, 1], [2]]
        assert [len(rows) for rows in volumes.scans(second.scan, 5)] == [5]
    (only,) = volumes.iterate_volumes(volumes.select(slices, ['a']))
    assert only.scan.tolist() == [0, 0, 1]
    assert [rows.tolist() for rows in volumes.scans(None, 2)] == [[0, 1]]


def test_pixels_of_lesion_are_none_of_background_and_none_of_the_ignored():
    mask = np.array([[0, 1, 2, 2, 255]])
    assert volumes.lesion_pixels(mask) == 3
    assert volumes.lesion_pixels(mask, 2) == 2


def by_sorting(image):
    """`measure_intensity` as its words have it, channel by channel in float64."""
    values = image.reshape(-1, image.shape[-1]).astype(np.float64)
    low, high = np.percentile(values, (10, 99), axis=0)
    clipped = np.clip(values, low, high)
    std = clipped.std(axis=0)
    return np.stack([low, high, clipped.mean(axis=0), np.where(std > 1e-6, std, 1.0)])


@pytest.mark.parametrize('kind', [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize('shape', [(5, 33, 47, 3), (1, 1, 1, 1), (1, 1, 7, 2), (3, 700, 600, 1)])
def test_intensity_is_the_same_whether_values_are_counted_or_sorted(rng, kind, shape):
    image = rng.gamma(2, 40, shape) * (rng.random(shape) < 0.7)
    image = (image if kind == np.uint8 else 90 * image - 700 * (kind == np.float32)).astype(kind)
    image[..., -1:] = image[..., -1:] if shape[-1] < 2 else 7  # a constant channel
    measured = volumes.measure_intensity(image)
    assert measured.dtype == np.float32
    np.testing.assert_allclose(measured, by_sorting(image), rtol=2e-6, atol=1e-6)


def test_grey_as_three_channels_takes_no_more_memory(rng):
    grey = rng.integers(0, 4000, (4, 30, 30, 1)).astype(np.uint16)
    image = volumes.fit_channels(grey, 3, 'x')
    assert np.shares_memory(image, grey)
    np.testing.assert_array_equal(
        volumes.measure_intensity(image), volumes.measure_intensity(np.repeat(grey, 3, axis=-1))
    )


def published(volume):
    """crop_sample, pad_sample and normalize_volume of Buda's utils.py by hand, without the resize
    between them: (the box, the dark voxels' volume, its normalised padded one), in float64.
    """
    volume = volume.astype(np.float64)
    volume[volume < volume.max() * 0.1] = 0
    box = tuple(slice(where.min(), where.max() + 1) for where in np.nonzero(volume.max(-1)))
    head = volume[box]
    D, H, W, C = head.shape
    side = max(H, W)
    before = (side - H) // 2, (side - W) // 2
    padded = np.zeros((D, side, side, C))
    padded[:, before[0] : before[0] + H, before[1] : before[1] + W] = head
    flat = np.sort(padded.ravel())

    def percentile(q):
        at = (len(flat) - 1) * q / 100
        low, high = flat[int(np.floor(at))], flat[int(np.ceil(at))]
        return low + (high - low) * (at % 1)

    p10, p99 = percentile(10), percentile(99)
    scaled = (np.clip(padded, p10, p99) - p10) / (p99 - p10)
    flat_C = scaled.reshape(-1, C)
    mean = flat_C.sum(0) / len(flat_C)
    deviation = np.sqrt(((flat_C - mean) ** 2).sum(0) / len(flat_C))
    normal = (scaled - mean) / deviation
    return box, head, normal[:, before[0] : before[0] + H, before[1] : before[1] + W]


def head(rng, kind, channels=3):
    """A bright ellipsoid, of another brightness in each channel, in a dark noisy background."""
    z, y, x = np.ogrid[-1:1:9j, -1:1:40j, -1:1:36j]
    inside = (z / 0.8) ** 2 + (y / 0.7) ** 2 + ((x - 0.1) / 0.5) ** 2 < 1
    bright = 90 * (1 + np.arange(channels)) / channels + rng.normal(60, 20, (*inside.shape, 1))
    image = np.where(inside[..., None], bright, 0) + rng.uniform(0, 15, (*inside.shape, channels))
    scale = {np.uint8: 1, np.uint16: 200, np.float32: 0.013}[kind]
    image = np.clip(image, 0, 255) * scale
    return image.astype(kind)


@pytest.mark.parametrize('kind', [np.uint8, np.uint16, np.float32])
def test_the_published_normalisation_is_that_of_the_published_code(rng, kind):
    volume = head(rng, kind)
    box, dark_is_0, expected = published(volume)
    assert volume[box].size < volume.size / 2
    intensity = volumes.measure([volume], 'buda')
    assert intensity.shape == (4, 3)
    assert (intensity[:2] == intensity[:2, :1]).all()  # one range for all channels
    found = volumes.normalize(dark_is_0, intensity)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    # Of the volume itself all but the dark voxels, and it isn't what 'volume' makes of it.
    seen = volumes.normalize(volume[box], intensity)
    np.testing.assert_allclose(seen[dark_is_0 > 0], expected[dark_is_0 > 0], atol=2e-5)
    other = volumes.normalize(volume[box], volumes.measure([volume], 'volume'))
    assert np.abs(other - expected)[dark_is_0 > 0].mean() > 0.2


def test_what_is_outside_the_head_is_not_measured(rng):
    volume = head(rng, np.uint8)
    wide = np.pad(volume, [(3, 2), (40, 9), (8, 30), (0, 0)])
    np.testing.assert_array_equal(volumes.measure_head([wide]), volumes.measure_head([volume]))
    assert (volumes.measure_intensity(wide) != volumes.measure_intensity(volume)).any()


def test_grey_is_measured_once_and_an_image_of_one_value_is_nothing(rng):
    grey = head(rng, np.uint16, channels=1)
    repeated = np.broadcast_to(grey, (*grey.shape[:3], 3))
    expected = np.repeat(volumes.measure_head([grey]), 3, axis=1)
    np.testing.assert_array_equal(volumes.measure_head([repeated]), expected)
    for value in (0, 7):
        flat = np.full((2, 5, 4, 2), value, np.uint8)
        normal = volumes.normalize(flat, volumes.measure_head([flat]))
        assert np.ptp(normal) == 0


def test_the_published_normalisation_is_of_slices_at_their_own_size(rng):
    """Also of those that training reads resized, and of a patient's pictures of several sizes."""
    first, second = head(rng, np.uint8), head(rng, np.uint8)[:4, 4:-4]
    images = [*first, *second]
    slices = volumes.from_volumes([
        volumes.Volume(name, image, image[..., 0], np.arange(len(image)),
                       volumes.measure_intensity(image))
        for name, image in (('a', first), ('b', second))
    ])  # fmt: skip
    resized = volumes.resized(slices, (24, 24))
    measured = volumes.measured(resized, 'buda')
    assert measured.read(0)[0].shape == (24, 24, 3)
    for name, image in (('a', first), ('b', second)):
        np.testing.assert_array_equal(measured.intensity[name], volumes.measure_head([image]))
    assert volumes.measured(slices, 'volume') is slices
    both = dataclasses.replace(
        slices, patient=np.array(['a'] * len(images)), intensity={'a': slices.intensity['a']}
    )
    expected = volumes.measure_head([first, second])
    for volume in volumes.iterate_volumes(both, 'buda'):
        np.testing.assert_array_equal(volume.intensity, expected)
    np.testing.assert_array_equal(volumes.measured(both, 'buda').intensity['a'], expected)


def two_sizes(rng, sizes=((9, 14), (20, 6))):
    """Slices of two patients, an image of each size."""
    found = []
    for name, size in zip('ab', sizes, strict=True):
        image = rng.integers(0, 255, (1, *size, 3), np.uint8)
        mask = rng.integers(0, 3, (1, *size)).astype(np.uint8)
        scale = volumes.measure_intensity(image)
        found.append(volumes.Volume(name, image, mask, np.arange(1), scale))
    return dataclasses.replace(volumes.from_volumes(found), sizes=np.array(sizes))


@pytest.mark.parametrize('seed', range(20))
def test_a_letterbox_is_pils(seed):
    """`ImageOps.contain` of float pixels, pasted into the middle by hand."""
    rng = np.random.default_rng(seed)
    own, size = rng.integers(5, 60, 2).tolist(), rng.integers(5, 60, 2).tolist()
    top, left, height, width = volumes.letterbox(own, size)
    slices = two_sizes(rng, (own, own))
    image, mask = volumes.resized(slices, size, 'letterbox', ignore_label=77).read(0)
    before, labels = slices.read(0)
    for channel in range(3):
        picture = Image.fromarray(before[..., channel].astype(np.float32))
        inside = ImageOps.contain(picture, size[::-1], Image.Resampling.BILINEAR)
        assert (inside.height, inside.width) == (height, width)
        whole = Image.new('F', size[::-1])
        whole.paste(inside, (left, top))
        np.testing.assert_array_equal(image[..., channel], np.rint(np.asarray(whole)))
    assert 0 <= size[0] - height - 2 * top <= 1
    assert 0 <= size[1] - width - 2 * left <= 1
    expected = np.full(size, 77)
    nearest = volumes.resize_labels(labels, (height, width))
    expected[top : top + height, left : left + width] = nearest
    np.testing.assert_array_equal(mask, expected)


def test_around_a_letterboxed_slice_is_the_zero_of_the_normalisation(rng):
    """The same from the host and from the device, and the slice itself is normalised as ever."""
    slices = two_sizes(rng)
    boxed = volumes.resized(slices, (16, 16))
    assert boxed.content.tolist() == [[3, 0, 10, 16], [0, 5, 16, 5]]
    assert volumes.select(boxed, ['b']).content.tolist() == [[0, 5, 16, 5]]
    drawn = pipeline.draws(boxed, seed=0, sampling='uniform', lesion_floor=0.0)
    places = {'batch_size': 2, 'first_step': 0}
    batch = next(pipeline.batches(boxed, drawn, intensity=None, threads=1, **places))
    rows = next(pipeline.rows(drawn, **places))
    for row, image, mask in zip(rows, batch['image'], batch['mask'], strict=True):
        top, left, height, width = boxed.content[row]
        inside = np.zeros((16, 16), bool)
        inside[top : top + height, left : left + width] = True
        small = volumes.resize_image(slices.read(row)[0], (height, width))
        expected = volumes.normalize(small, slices.intensity['ab'[row]])
        np.testing.assert_array_equal(image[inside].reshape(expected.shape), expected)
        assert not image[~inside].any()
        assert (mask[~inside] == volumes.IGNORE_LABEL).all()
        assert (mask[inside] < 3).all()
    gathered = placement.gather(pipeline.store(boxed, None), rows)
    np.testing.assert_array_equal(gathered['image'], batch['image'])


def test_to_stretch_is_what_it_was(rng):
    slices = two_sizes(rng)
    stretched = volumes.resized(slices, (16, 16), 'stretch')
    for key in (0, 1):
        image, mask = slices.read(key)
        np.testing.assert_array_equal(stretched.read(key)[0], volumes.resize_image(image, (16, 16)))
        np.testing.assert_array_equal(stretched.read(key)[1], volumes.resize_labels(mask, (16, 16)))
    assert stretched.content is None
