"""Synthetic heads: three-channel volumes with tumours of known outline.

They are no anatomy, but have what makes the real task hard: each volume has its own contrast,
bias field and noise; fat, scalp and harmless bright spots are as bright on FLAIR as the tumour,
so no threshold finds it; tumours are irregular and of any size, and some slices have none.
Channels as in LGG: pre-contrast, FLAIR, post-contrast.
"""

import numpy as np
from scipy import ndimage

from pspnet_jax.data.volumes import Slices, Volume, from_volumes, measure_intensity
from pspnet_jax.runtime.errors import ConfigError


def load(*, volumes: int, slices: int, size: int, seed: int) -> Slices:
    """Slices of `volumes` phantoms; number i depends only on (seed, i)."""
    return from_volumes([make_volume(seed, i, slices, size) for i in range(volumes)])


def make_volume(seed: int, index: int, slices: int, size: int) -> Volume:
    """Phantom `index`: image `slices` x `size` x `size` x 3 uint8, mask 0 or 1.

    Raises ConfigError for a single slice, as some must be without a tumour.
    """
    if slices < 2:
        raise ConfigError(f'slices={slices} leaves no slice without a tumour: give at least 2')
    rng = np.random.default_rng([seed, index])
    shape = (slices, size, size)
    z, y, x = np.meshgrid(
        np.linspace(-0.85, 0.85, slices), *[np.linspace(-1, 1, size)] * 2, indexing='ij'
    )
    # The head: an ellipsoid with a wavy outline at a random position.
    center, radius = rng.uniform(-0.06, 0.06, 2), rng.uniform(0.70, 0.84, 2)
    wave = 0.05 * _smooth_noise(rng, shape, (2.0, size / 5, size / 5))
    r = np.sqrt(
        (z / 1.15) ** 2 + ((y - center[0]) / radius[0]) ** 2 + ((x - center[1]) / radius[1]) ** 2
    )
    r = r + wave
    scalp, skull, brain = r < 1.12, r < 1.05, r < 0.95

    # Tissue: white matter inside a folded rim of grey, ventricles and sulci of fluid.
    folds = _smooth_noise(rng, shape, (1.0, size / 28, size / 28))
    gray = brain & (r + 0.10 * folds > 0.78)
    fluid = brain & (r + 0.12 * folds > 0.96)
    wide = rng.uniform(0.10, 0.18)
    for side in (-1, 1):
        dx = (x - center[1] - side * rng.uniform(0.10, 0.15)) / wide
        dy = (y - center[0] - rng.uniform(-0.1, 0.1)) / (2.2 * wide)
        fluid |= brain & (dx**2 + dy**2 + (z / 0.5) ** 2 + 0.3 * folds < 1)

    tumor = _tumor(rng, shape, (z, y, x), brain, center, radius)  # it displaces what was there
    # Small harmless spots in the white matter that are bright on FLAIR.
    spots = brain & ~fluid & ~tumor & (_smooth_noise(rng, shape, (0.7, size / 50, size / 50)) > 2.3)

    # Intensity of air, scalp, skull, white, gray, fluid, tumour, spots on pre, FLAIR, post.
    table = np.array(
        [[2, 150, 15, 110, 85, 30, 70, 95],
         [2, 140, 12, 70, 92, 18, 135, 140],
         [2, 155, 15, 105, 84, 32, 75, 95]], np.float64
    )  # fmt: skip
    table = table * rng.uniform(0.85, 1.15, table.shape)
    table[1, 6] = rng.uniform(1.35, 1.7) * table[1, 4]  # tumour against gray matter, on FLAIR
    tissue = np.zeros(shape, np.int64)
    for label, where in enumerate((scalp, skull, brain, gray, fluid, tumor, spots), start=1):
        tissue[where] = label
    rim = tumor & ~ndimage.binary_erosion(tumor, iterations=2)
    texture = 0.05 * _smooth_noise(rng, shape, (0.5, 1.0, 1.0))
    image = np.empty((*shape, 3), np.float64)
    for channel in range(3):
        signal = table[channel][tissue] * (1 + texture)
        if channel == 2 and rng.random() < 0.5:
            signal[rim] *= rng.uniform(1.2, 1.6)  # some tumours take up contrast
        signal = ndimage.gaussian_filter(signal, (0.0, 0.7, 0.7))
        bias = 1 + 0.15 * _smooth_noise(rng, shape, (slices / 2, size / 2.5, size / 2.5))
        noise = rng.normal(0, rng.uniform(3, 7), shape)
        image[..., channel] = signal * bias * rng.uniform(0.6, 1.3) + noise
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return Volume(
        f'phantom_{index:03d}',
        image,
        tumor.astype(np.uint8),
        np.arange(1, slices + 1),
        measure_intensity(image),
    )


def _tumor(rng, shape, zyx, tissue, center, radius) -> np.ndarray:
    """An irregular blob inside `tissue` that is not in all slices."""
    z, y, x = zyx
    size = shape[1]
    while True:
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.30, 0.60)
        cz = rng.uniform(-0.35, 0.35)
        cy = center[0] + away * radius[0] * np.sin(angle)
        cx = center[1] + away * radius[1] * np.cos(angle)
        height, wide = rng.uniform(0.25, 0.45), rng.uniform(0.20, 0.38, 2)
        distance = np.sqrt(
            ((z - cz) / height) ** 2 + ((y - cy) / wide[0]) ** 2 + ((x - cx) / wide[1]) ** 2
        )
        bumps = 0.22 * _smooth_noise(rng, shape, (1.5, size / 14, size / 14))
        tumor = (distance + bumps < 1) & tissue
        # Redraw the rare blob that lies mostly outside the brain.
        if tumor.sum() > 0.01 * tissue.sum() and not tumor.any((1, 2)).all():
            return ndimage.binary_opening(tumor, np.ones((1, 2, 2)))


def _smooth_noise(rng, shape, sigma) -> np.ndarray:
    """Gaussian field of unit variance, smooth on the scale of `sigma` voxels."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode='wrap')
    return (field - field.mean()) / field.std()
