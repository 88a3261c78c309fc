"""VGG16 weights: torchvision's arrays in their places, strictly, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pspnet_jax import models, optim, train
from pspnet_jax.errors import PretrainedError
from pspnet_jax.models import pretrained
from pspnet_jax.models.backbones import VGG16
from tests.conftest import SHARED, needs_shared, tiny_config

SHAPES = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256),
          (512, 256), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512)]  # fmt: skip
NUMBERS = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


@pytest.fixture(scope='module')
def arrays():
    rng = np.random.default_rng(0)
    found = {}
    for n, (out, into) in zip(NUMBERS, SHAPES, strict=True):
        scale = np.sqrt(2 / (9 * into))
        found[f'features.{n}.weight'] = (scale * rng.standard_normal((out, into, 3, 3))).astype(
            np.float32
        )
        found[f'features.{n}.bias'] = (0.1 * rng.standard_normal(out)).astype(np.float32)
    return found


def params():
    model = models.create('pspnet', backbone='vgg16', num_classes=2)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes['params'])


@pytest.mark.parametrize('kind', ['safetensors', 'npz'])
def test_every_array_lands_in_its_place(arrays, tmp_path, kind):
    path = tmp_path / f'weights.{kind}'
    save_file(arrays, path) if kind == 'safetensors' else np.savez(path, **arrays)
    loaded, report = pretrained.load_vgg16(params(), path)
    kernel = loaded['backbone']['conv3_2']['kernel']
    assert (kernel == arrays['features.12.weight'].transpose(2, 3, 1, 0)).all()
    assert (loaded['backbone']['conv5_3']['bias'] == arrays['features.28.bias']).all()
    assert '26 arrays of the backbone loaded' in report
    assert 'random: aux, head, pyramid' in report


def test_training_starts_from_it_with_an_average_kept(arrays, tmp_path):
    """Parameters and average are donated apart: neither may be the other's buffer."""
    save_file(arrays, tmp_path / 'w.safetensors')
    config = tiny_config(
        **{'model.backbone': 'vgg16', 'model.width': 64, 'model.output_stride': 32}
    )
    config.model.pretrained = str(tmp_path / 'w.safetensors')
    model = models.create(**config.model)
    tx, _ = optim.create(steps=4, **config.optim)
    state, _ = train.start_or_resume(config, model, tx, 3, str(tmp_path))
    expected = arrays['features.0.weight'].transpose(2, 3, 1, 0)
    for tree in (state.params, state.ema_params):
        assert (np.asarray(tree['backbone']['conv1_1']['kernel']) == expected).all()
    placed = train.over_mesh(lambda state, batch: (state, batch))
    placed.step(placed.put_state(state), placed.put_batch(np.zeros((8, 1))))


def test_both_sides_of_a_difference_are_listed(arrays, tmp_path):
    wrong = {**arrays, 'features.99.weight': np.zeros((1, 1, 3, 3), np.float32)}
    del wrong['features.0.bias']
    wrong['features.2.weight'] = np.zeros((64, 32, 3, 3), np.float32)
    save_file(wrong, tmp_path / 'w.safetensors')
    with pytest.raises(PretrainedError) as caught:
        pretrained.load_vgg16(params(), tmp_path / 'w.safetensors')
    message = str(caught.value)
    assert 'the model has conv1_1/bias, the file has not' in message
    assert 'the file has (unknown) features.99.weight, the model has not' in message
    assert 'conv1_2/kernel is (3, 3, 64, 64) in the model, (3, 3, 32, 64) in the file' in message


def test_the_classifier_of_a_whole_vgg16_is_left_out(arrays, tmp_path):
    whole = {**arrays, 'classifier.0.weight': np.zeros((2, 2), np.float32)}
    save_file(whole, tmp_path / 'w.safetensors')
    pretrained.load_vgg16(params(), tmp_path / 'w.safetensors')


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('missing.npz', None, 'is not a file'),
        ('weights.pth', b'x', 'ends in neither .safetensors nor .npz'),
        ('broken.safetensors', b'not safetensors', 'is not a readable weight file'),
        ('broken.npz', b'not npz', 'is not a readable weight file'),
    ],
)
def test_a_file_that_can_not_be_read_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PretrainedError, match=message):
        pretrained.read_arrays(tmp_path / name)


def torch_vgg16(arrays, image):
    """torchvision's features, layer by layer, in PyTorch: block outputs before pooling."""
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    x, blocks = torch.from_numpy(image.transpose(0, 3, 1, 2).copy()), []
    for n in NUMBERS:
        weight, bias = (torch.from_numpy(arrays[f'features.{n}.{k}']) for k in ('weight', 'bias'))
        x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, padding=1))
        if n in (2, 7, 14, 21, 28):
            x = torch.nn.functional.max_pool2d(x, 2)
            blocks.append(x.numpy().transpose(0, 2, 3, 1))
    return blocks


def check_against_torch(arrays, image):
    converted = pretrained.vgg16_from_torchvision(arrays)
    tree = {}
    for name, array in converted.items():
        layer, kind = name.split('/')
        tree.setdefault(layer, {})[kind] = array
    features = jax.jit(VGG16(output_stride=32).apply)({'params': tree}, image)
    for stride, expected in zip((2, 4, 8, 16, 32), torch_vgg16(arrays, image), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(features[stride] / scale, expected / scale, atol=1e-5)


def test_features_equal_pytorchs(arrays, rng):
    check_against_torch(arrays, rng.standard_normal((1, 64, 96, 3)).astype(np.float32))


@needs_shared
def test_the_shared_imagenet_weights_load_and_equal_pytorchs(rng):
    path = SHARED / 'weights' / 'vgg16_imagenet.safetensors'
    _, report = pretrained.load_vgg16(params(), path)
    assert '14,714,688 values' in report
    image = rng.standard_normal((1, 64, 64, 3)).astype(np.float32)
    check_against_torch(pretrained.read_arrays(path), image)
