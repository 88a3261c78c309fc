"""Tiles, scales, mirror images and ensembles, each against what it is by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, signal

from pspnet_jax.data import volumes
from pspnet_jax.inference import crf, infer

OPTIONS = {'window': 16, 'overlap': 0.5, 'batch_size': 4}


class Conv(nn.Module):
    """Three scores from a convolution: a kernel of 1 sees each pixel alone."""

    kernel: int = 5

    @nn.compact
    def __call__(self, image, train=False):
        return {'logits': nn.Conv(3, (self.kernel,) * 2, use_bias=True)(image)}


class Place(nn.Module):
    """Two scores that depend on where in the tile a pixel is, and on nothing else."""

    def __call__(self, image, train=False):
        rows, columns = jnp.mgrid[: image.shape[1], : image.shape[2]]
        score = jnp.sin(rows * 0.9) + jnp.cos(columns * 0.4)
        logits = jnp.stack([score, -score], axis=-1)
        return {'logits': jnp.broadcast_to(logits, (len(image), *logits.shape))}


def variables_of(model, seed=0):
    return model.init(jax.random.key(seed), np.zeros((1, 8, 8, 2), np.float32))


def plain(model, variables, images):
    return jax.nn.softmax(model.apply(variables, images)['logits'])


@pytest.fixture
def images(rng):
    return rng.standard_normal((3, 24, 30, 2)).astype(np.float32)


def test_a_window_as_large_as_the_image_is_the_plain_forward(images):
    model, variables = Conv(), variables_of(Conv())
    square = images[:, :, :24]
    predict = infer.compile_predict(model, window=24, batch_size=2)
    np.testing.assert_allclose(
        predict(variables, square), plain(model, variables, square), atol=1e-6
    )


def test_at_a_size_the_network_sees_the_average_and_the_image_gets_its_own_size_back(images):
    model, variables = Conv(kernel=1), variables_of(Conv(kernel=1))
    same = infer.compile_predict(model, size=images.shape[1:3])
    np.testing.assert_allclose(same(variables, images), plain(model, variables, images), atol=1e-6)
    # Blocks of 4 x 4 equal pixels: what is left of them at a quarter of the size is their value.
    small = np.repeat(images[:, :1, :1], 6, axis=1).repeat(7, axis=2)
    large = small.repeat(4, axis=1).repeat(4, axis=2)
    half = infer.compile_predict(model, size=(6, 7))
    np.testing.assert_allclose(half(variables, large), plain(model, variables, large), atol=1e-5)
    seen = []

    class Seen(nn.Module):
        def __call__(self, image, train=False):
            seen.append(image.shape)
            return {'logits': image}

    out = infer.compile_predict(Seen(), size=(6, 7))({}, large)
    assert seen[0][1:3] == (6, 7)
    assert out.shape == large.shape


def test_what_data_size_shrinks_comes_back_to_where_it_was(rng):
    """A network that says of each pixel what share of it is lesion, 1024 -> 256: what is lost is
    the edge between pixels. With aligned corners on the way back the score was 0.94.
    """

    class Share(nn.Module):
        def __call__(self, image, train=False):
            share = jnp.clip(image[..., :1], 1e-6, 1 - 1e-6)
            return {'logits': jnp.log(jnp.concatenate([1 - share, share], axis=-1))}

    predict = infer.compile_predict(Share(), size=(256, 256))
    rows, columns = np.indices((1024, 1024))
    scores = []
    for row, column in [(40, 40), (980, 50), (512, 990), (60, 700), (700, 980)]:
        mask = (rows - row) ** 2 + (columns - column) ** 2 < 20**2
        prob = predict({}, mask[None, ..., None].astype(np.float32))
        pred = prob[0, ..., 1] > 0.5
        scores.append(2 * (pred & mask).sum() / (pred.sum() + mask.sum()))
    assert np.mean(scores) > 0.99


@pytest.mark.parametrize('own', [(20, 36), (9, 50)])
def test_back_from_data_size_is_pytorchs_half_pixel_interpolation(rng, own):
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    small = rng.random((1, 8, 8, 2)).astype(np.float32)

    class Fixed(nn.Module):
        def __call__(self, image, train=False):
            return {'logits': jnp.asarray(small)}

    out = infer.compile_predict(Fixed(), size=(8, 8), fit='stretch')(
        {}, np.zeros((1, *own, 1), np.float32)
    )
    prob = torch.softmax(torch.from_numpy(small), -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(prob, size=own, mode='bilinear', align_corners=False)
    np.testing.assert_allclose(out, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)


@pytest.mark.parametrize('own', [(20, 36), (50, 9), (24, 16)])
@pytest.mark.parametrize('kernel', ['none', 'windowed'])
def test_at_a_size_the_network_sees_images_in_proportion_with_zeros_around(rng, own, kernel):
    """And their own part of what it says comes back: the CRF too sees nothing else."""
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    model, variables = Conv(), variables_of(Conv())
    image = rng.standard_normal((2, *own, 2)).astype(np.float32)
    options = {'kernel': kernel, 'window': 3, 'iterations': 2}
    found = infer.compile_predict(model, size=(24, 16), crf_options=options)(variables, image)

    top, left, height, width = volumes.letterbox(own, (24, 16))
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    small = np.stack([volumes.resize_image(one, (height, width)) for one in image])
    seen = np.zeros((2, 24, 16, 2), np.float32)
    seen[inside] = small
    prob = np.asarray(plain(model, variables, seen))[inside]
    prob = np.array(infer.refine(jnp.asarray(prob), jnp.asarray(small), **options))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(prob).permute(0, 3, 1, 2), size=own, mode='bilinear', align_corners=False
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_image_smaller_than_the_window_is_seen_with_zeros_around_it(images):
    model, variables = Conv(), variables_of(Conv())
    predict = infer.compile_predict(model, window=32, batch_size=2)
    padded = np.pad(images, ((0, 0), (4, 4), (1, 1), (0, 0)))
    expected = plain(model, variables, padded)[:, 4:28, 1:31]
    np.testing.assert_allclose(predict(variables, images), expected, atol=1e-6)


@pytest.mark.parametrize('window', [7, 16, 23])
@pytest.mark.parametrize('overlap', [0.0, 0.5, 0.8])
def test_tiles_do_not_show_where_each_pixel_is_seen_alone(images, window, overlap):
    model, variables = Conv(1), variables_of(Conv(1))
    predict = infer.compile_predict(model, window=window, overlap=overlap, batch_size=4)
    expected = plain(model, variables, images)
    np.testing.assert_allclose(predict(variables, images), expected, atol=1e-6)


@pytest.mark.parametrize('size', [(16, 16), (17, 40), (33, 21)])
def test_blending_is_the_mean_weighted_by_gaussians(size):
    window, overlap = 16, 0.5
    predict = infer.compile_predict(Place(), window=window, overlap=overlap, batch_size=3)
    (found,) = predict({}, np.zeros((1, *size, 1), np.float32))
    tile = np.asarray(plain(Place(), {}, np.zeros((1, window, window, 1))), np.float64)[0]
    line = signal.windows.gaussian(window, std=window / 8)
    total, weight = np.zeros((*size, 2)), np.zeros((*size, 1))
    for i in infer.tile_starts(size[0], window, overlap):
        for j in infer.tile_starts(size[1], window, overlap):
            for a in range(window):
                for b in range(window):
                    total[i + a, j + b] += line[a] * line[b] * tile[a, b]
                    weight[i + a, j + b] += line[a] * line[b]
    np.testing.assert_allclose(found, total / weight, atol=1e-5)


@pytest.mark.parametrize('window', [1, 2, 7, 64, 513])
def test_every_pixel_of_a_tile_counts(window):
    line = infer.gaussian(window)
    assert ((line[:, None] * line) > 0).all()


@pytest.mark.parametrize('overlap', [0.0, 0.25, 0.5, 0.9])
def test_tiles_go_from_edge_to_edge_and_overlap_as_asked(overlap):
    for window in (1, 5, 16):
        for size in range(window, 70):
            starts = infer.tile_starts(size, window, overlap)
            assert (starts[0], starts[-1]) == (0, size - window)
            steps = np.diff(starts)
            assert (steps > 0).all()
            assert (steps <= np.ceil(max(window * (1 - overlap), 1))).all()


def test_images_of_all_sizes_are_few_programs(rng):
    shapes = []

    class Traced(nn.Module):
        def __call__(self, image, train=False):
            shapes.append(image.shape)
            return {'logits': image}

    predict = infer.compile_predict(Traced(), **OPTIONS)
    for size in [(16, 16), (20, 30), (31, 17), (50, 60), (9, 40), (64, 16)]:
        assert predict({}, rng.random((1, *size, 2), np.float32)).shape == (1, *size, 2)
    assert len(shapes) == len(set(shapes)) <= 3
    assert {shape[1:] for shape in shapes} == {(16, 16, 2)}


def test_a_batch_is_padded_to_a_power_of_two_or_to_the_batch_size():
    lengths = [len(infer.pad_batch(np.ones((n, 2)), 12)) for n in range(1, 13)]
    assert lengths == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]
    assert infer.pad_batch(np.ones((3, 2)), 12).sum() == 6


@pytest.mark.parametrize('window', [0, 16])
def test_flip_is_the_mean_with_the_mirror_image(images, window):
    model, variables = Conv(), variables_of(Conv())
    options = OPTIONS | {'window': window}
    once, both = (infer.compile_predict(model, flip=flip, **options) for flip in (False, True))
    expected = (
        once(variables, images) + once(variables, images[:, :, ::-1].copy())[:, :, ::-1]
    ) / 2
    np.testing.assert_allclose(both(variables, images), expected, atol=1e-6)
    assert np.abs(both(variables, images) - once(variables, images)).max() > 1e-2


@pytest.mark.parametrize('window', [0, 16])
def test_a_mirror_symmetric_image_has_mirror_symmetric_probabilities(images, window):
    symmetric = images + images[:, :, ::-1]
    predict = infer.compile_predict(Conv(), flip=True, **OPTIONS | {'window': window})
    prob = predict(variables_of(Conv()), symmetric)
    np.testing.assert_allclose(prob, prob[:, :, ::-1], atol=1e-6)


def test_scales_are_the_mean_of_the_image_at_each(images):
    model, variables = Conv(), variables_of(Conv())

    def zoom(x_HWC, size):
        factors = (size[0] / x_HWC.shape[0], size[1] / x_HWC.shape[1], 1)
        # First cell to first, last to last.
        return ndimage.zoom(x_HWC, factors, order=1, mode='nearest')

    scales = (0.5, 1.0, 1.25)
    predict = infer.compile_predict(model, scales=scales)
    for image, prob in zip(images, predict(variables, images), strict=True):
        total = 0
        for size in ((12, 15), (24, 30), (30, 38)):  # 37.5 rounds to even
            small = plain(model, variables, zoom(image, size)[None])[0]
            total = total + zoom(np.asarray(small), (24, 30))
        np.testing.assert_allclose(prob, total / 3, atol=1e-5)
    one = infer.compile_predict(model, scales=(1.0,))(variables, images)
    np.testing.assert_allclose(one, plain(model, variables, images), atol=1e-6)


@pytest.mark.parametrize('options', [{}, {'window': 16, 'batch_size': 4}, {'flip': True}])
def test_an_ensemble_is_the_mean_of_its_members(images, options):
    model = Conv()
    members = [variables_of(model, seed) for seed in (0, 1)]
    single = infer.compile_predict(model, **options)
    ensemble = infer.compile_predict(model, ensemble=True, **options)

    def stacked(*trees):
        return jax.tree.map(lambda *arrays: np.stack(arrays), *trees)

    apart = [single(variables, images) for variables in members]
    mean = ensemble(stacked(*members), images)
    np.testing.assert_allclose(mean, (apart[0] + apart[1]) / 2, atol=1e-6)
    twice = ensemble(stacked(members[0], members[0]), images)
    np.testing.assert_allclose(twice, apart[0], atol=1e-6)
    assert np.abs(apart[0] - apart[1]).max() > 1e-2


def test_the_crf_sees_whole_images_behind_tiles(images):
    model, variables = Conv(1), variables_of(Conv(1))  # tiles do not show
    crf_options = {'kernel': 'windowed', 'window': 2, 'iterations': 2, 'color_sigma': 0.5}
    predict = infer.compile_predict(model, crf_options=crf_options, **OPTIONS)
    logits = model.apply(variables, images)['logits']
    for image, score, prob in zip(images, logits, predict(variables, images), strict=True):
        expected = crf.mean_field(score, image, window=2, iterations=2, color_sigma=0.5)
        np.testing.assert_allclose(prob, expected, atol=1e-4)


def test_probabilities_sum_to_one_whatever_is_averaged(images):
    predict = infer.compile_predict(Conv(), scales=(0.75, 1.25), flip=True, **OPTIONS)
    prob = predict(variables_of(Conv()), images)
    assert prob.shape == (3, 24, 30, 3)
    assert prob.dtype == np.float32
    np.testing.assert_allclose(prob.sum(-1), 1, atol=1e-5)
