"""Mean field against a loop over all pairs of pixels, and against pydensecrf."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.inference import crf, infer
from pspnet_jax.runtime.compilation import jit
from pspnet_jax.runtime.errors import ConfigError

OPTIONS = {
    'spatial_weight': 2.0,
    'spatial_sigma': 1.5,
    'bilateral_weight': 3.0,
    'bilateral_sigma': 4.0,
    'color_sigma': 0.7,
}


def brute_force(logits, image, window, iterations, options):
    """The equations, one pair of pixels at a time, in float64."""
    H, W, K = logits.shape
    pixels = [(i, j) for i in range(H) for j in range(W)]
    kernels = np.zeros((2, len(pixels), len(pixels)))
    for a, p in enumerate(pixels):
        for b, q in enumerate(pixels):
            d2 = (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2
            c2 = ((image[p] - image[q]) ** 2).sum()
            kernels[0, a, b] = np.exp(-d2 / (2 * options['spatial_sigma'] ** 2))
            if max(abs(p[0] - q[0]), abs(p[1] - q[1])) <= window:
                kernels[1, a, b] = np.exp(
                    -d2 / (2 * options['bilateral_sigma'] ** 2)
                    - c2 / (2 * options['color_sigma'] ** 2)
                )
    weights = options['spatial_weight'], options['bilateral_weight']
    total = 0
    for weight, kernel in zip(weights, kernels, strict=True):
        norm = 1 / np.sqrt(kernel.sum(1))
        total = total + weight * norm[:, None] * kernel * norm

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    unary = logits.reshape(-1, K).astype(np.float64)
    q = softmax(unary)
    for _ in range(iterations):
        q = softmax(unary + total @ q)
    return q.reshape(H, W, K)


@pytest.mark.parametrize('window', [None, 2])
@pytest.mark.parametrize('iterations', [1, 5])
def test_mean_field_equals_the_loop_over_all_pairs(rng, window, iterations):
    logits = rng.standard_normal((6, 9, 3)).astype(np.float32)
    image = rng.standard_normal((6, 9, 2)).astype(np.float32)
    ours = jit(lambda a, b: crf.mean_field(a, b, window=window, iterations=iterations, **OPTIONS))(
        logits, image
    )
    expected = brute_force(logits, image, 99 if window is None else window, iterations, OPTIONS)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_window_over_the_whole_image_is_exact(rng):
    logits = jnp.asarray(rng.standard_normal((7, 5, 2)), jnp.float32)
    image = jnp.asarray(rng.standard_normal((7, 5, 3)), jnp.float32)
    exact = crf.mean_field(logits, image, window=None, **OPTIONS)
    windowed = crf.mean_field(logits, image, window=6, **OPTIONS)
    np.testing.assert_allclose(exact, windowed, atol=1e-5)


def test_a_speck_against_its_surroundings_is_smoothed_away_and_an_edge_is_kept():
    image = np.zeros((16, 16, 1), np.float32)
    image[:, 8:] = 5.0  # an edge in the picture
    logits = np.zeros((16, 16, 2), np.float32)
    logits[:, :8, 0] = logits[:, 8:, 1] = 1.0  # which the scores follow,
    logits[4, 3] = (0.0, 0.5)  # but for a speck
    labels = np.asarray(crf.mean_field(logits, image, window=None, **OPTIONS)).argmax(-1)
    assert (labels == (np.arange(16) >= 8)).all()


@pytest.mark.slow
def test_it_agrees_with_pydensecrf(rng):
    """The permutohedral lattice is itself an approximation: the labels agree but for a few."""
    densecrf = pytest.importorskip('pydensecrf.densecrf', reason='pydensecrf is the reference')
    H = W = 40
    rows, columns = np.mgrid[:H, :W]
    truth = ((rows - 18) ** 2 + (columns - 22) ** 2 < 120).astype(int)
    image = np.clip(60 + 90 * truth[..., None] + 8 * rng.standard_normal((H, W, 3)), 0, 255)
    image = image.astype(np.uint8)
    logits = 1.2 * np.eye(2)[truth] + 0.9 * rng.standard_normal((H, W, 2))
    logits = logits.astype(np.float32)

    theirs = densecrf.DenseCRF2D(W, H, 2)
    theirs.setUnaryEnergy(np.ascontiguousarray(-logits.reshape(-1, 2).T))
    theirs.addPairwiseGaussian(sxy=3, compat=3)
    theirs.addPairwiseBilateral(sxy=20, srgb=13, rgbim=image, compat=4)
    expected = np.array(theirs.inference(5)).reshape(2, H, W).transpose(1, 2, 0)
    ours = np.asarray(
        crf.mean_field(
            logits, image, window=None, iterations=5, bilateral_sigma=20.0, color_sigma=13.0
        )
    )
    before = (logits.argmax(-1) != truth).mean()
    assert before > 0.1  # the problem is not solved without it
    assert (ours.argmax(-1) == expected.argmax(-1)).mean() > 0.99
    assert np.abs(ours - expected).mean() < 0.02
    assert (ours.argmax(-1) != truth).mean() < 0.02


class Scores(nn.Module):
    """A network without parameters: two scores from the image's first channel."""

    def __call__(self, image, train=False):
        return {'logits': jnp.stack([-image[..., 0], image[..., 0]], axis=-1)}


@pytest.mark.parametrize(('kernel', 'window'), [('exact', None), ('windowed', 3)])
def test_prediction_puts_it_behind_the_network_image_by_image(rng, kernel, window):
    images = rng.standard_normal((3, 12, 10, 2)).astype(np.float32)
    predict = infer.compile_predict(
        Scores(), crf_options={'kernel': kernel, 'window': 3, 'iterations': 4, **OPTIONS}
    )
    for image, probability in zip(images, predict({}, images), strict=True):
        logits = Scores().apply({}, image)['logits']
        expected = crf.mean_field(logits, image, window=window, iterations=4, **OPTIONS)
        np.testing.assert_allclose(probability, expected, atol=1e-5)
    plain = infer.compile_predict(Scores(), crf_options={'kernel': 'none', 'window': 3, **OPTIONS})
    np.testing.assert_allclose(
        plain({}, images), jax.nn.softmax(Scores().apply({}, images)['logits']), atol=1e-6
    )


def test_all_pairs_of_a_large_image_are_refused():
    predict = infer.compile_predict(
        Scores(), crf_options={'kernel': 'exact', 'window': 3, **OPTIONS}
    )
    with pytest.raises(
        ConfigError, match=r"up to 16384 pixels, but the images have 128 x 129: use 'w"
    ):
        predict({}, np.zeros((1, 128, 129, 1), np.float32))
