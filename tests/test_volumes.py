"""Slices, volumes and their intensity scale."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from pspnet_jax.data import phantom, volumes
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
    assert volumes.describe(part) == '1 patients, 5 slices, 5 with lesion'


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
    monkeypatch.setattr(volumes, 'GROUPS', tmp_path)
    monkeypatch.setattr(volumes, 'OWN_GROUP', tmp_path / 'own')
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
