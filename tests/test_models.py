"""Every network: its size, its dilation, its branches, any input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import models
from pspnet_jax.models import backbones

# Parameters for 2 and 21 classes. If you meant to change a network, update this table.
COUNTS = {
    ('pspnet', 'vgg16'): (20_879_172, 20_893_946),
    ('pspnet', 'resnet18'): (17_000_004, 17_014_778),
    ('pspnet', 'resnet34'): (27_108_164, 27_122_938),
    ('pspnet', 'resnet50'): (48_938_820, 48_953_594),
    ('pspnet', 'resnet101'): (67_930_948, 67_945_722),
    ('vgg_pspnet_blog', 'vgg16'): (17_088_322, 17_175_893),
}


@functools.cache
def variables(name, backbone, num_classes=2, **options):
    model = models.create(name, backbone=backbone, num_classes=num_classes, **options)
    image = jnp.zeros((1, 33, 33, 3))
    return model, jax.eval_shape(functools.partial(model.init, train=False), key(), image)


def key():
    return jax.random.key(0)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(('name', 'backbone'), COUNTS)
def test_parameter_count(name, backbone):
    for num_classes, expected in zip((2, 21), COUNTS[name, backbone], strict=True):
        _, shapes = variables(name, backbone, num_classes)
        assert count(shapes['params']) == expected, 'if this was meant, update COUNTS in this file'


def test_the_table_of_counts_is_complete():
    assert {name for name, _ in COUNTS} == set(models.MODELS)
    assert {backbone for name, backbone in COUNTS if name == 'pspnet'} == set(backbones.BACKBONES)


def test_the_blogs_network_has_the_published_size_and_geometry():
    model, shapes = variables('vgg_pspnet_blog', 'vgg16')
    assert count(shapes) == 17_093_442  # image-segmentation-keras counts BN statistics too
    out = jax.eval_shape(model.apply, shapes, jnp.zeros((1, 384, 384, 3)))
    assert out['logits'].shape == (1, 96, 96, 2)


def test_resnet_sizes_are_torchvisions():
    # torchvision's ResNets have a classifier of 1000 classes behind the same layers.
    published = {
        'resnet18': 11_689_512 - 513_000,
        'resnet34': 21_797_672 - 513_000,
        'resnet50': 25_557_032 - 2_049_000,
        'resnet101': 44_549_160 - 2_049_000,
    }
    for name, expected in published.items():
        _, shapes = variables('pspnet', name)
        assert count(shapes['params']['backbone']) == expected


@pytest.mark.parametrize('backbone', ['vgg16', 'resnet18', 'resnet50'])
def test_dilated_equals_strided_on_the_sub_grid(backbone):
    """Yu and Koltun 2016: at stride 32 the network computes every fourth cell of stride 8."""

    def features(stride):
        class Net(backbones.nn.Module):
            @backbones.nn.compact
            def __call__(self, x):
                return backbones.create(backbone, output_stride=stride, width=8)(x)

        return Net()

    # Far from the border, since zero padding reaches differently far; VGG's pooling layers
    # are left out when dilated, so its features agree only up to block 4 there.
    image = jax.random.normal(key(), (1, 64 + 1, 64 + 1, 3))
    if backbone == 'vgg16':
        strided, dilated, at = features(32), features(8), 8
    else:
        strided, dilated, at = features(32), features(8), 32
    values = strided.init(key(), image)
    coarse, fine = strided.apply(values, image)[at], dilated.apply(values, image)[at]
    step = 1 if backbone == 'vgg16' else 4
    np.testing.assert_allclose(coarse, fine[:, ::step, ::step], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('backbone', backbones.BACKBONES)
@pytest.mark.parametrize('stride', backbones.OUTPUT_STRIDES)
def test_features_have_the_promised_strides(backbone, stride):
    class Net(backbones.nn.Module):
        @backbones.nn.compact
        def __call__(self, x):
            return backbones.create(backbone, output_stride=stride, width=8)(x)

    out, _ = jax.eval_shape(lambda x: Net().init_with_output(key(), x), jnp.zeros((1, 96, 64, 3)))
    assert {nominal: value.shape[1:3] for nominal, value in out.items()} == {
        nominal: (96 // min(nominal, stride), 64 // min(nominal, stride))
        for nominal in (2, 4, 8, 16, 32)
    }


SMALL = {
    'pspnet': {'backbone': 'resnet18', 'width': 8, 'dropout': 0.0},
    'vgg_pspnet_blog': {'backbone': 'vgg16'},
}


@pytest.mark.parametrize('name', models.MODELS)
def test_every_parameter_reaches_the_output(name):
    model = models.create(name, num_classes=3, **SMALL[name])
    image = jax.random.normal(key(), (2, 64, 64, 3))
    values = model.init(key(), image, train=False)

    def loss(params):
        out, _ = model.apply(
            {**values, 'params': params}, image, train=True, mutable=['batch_stats']
        )
        return sum((value * jnp.arange(1.0, 4.0)[None, None, None]).std() for value in out.values())

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(values['params'])):
        assert jnp.abs(grad).max() > 0, f'{jax.tree_util.keystr(path)} changes nothing'


@pytest.mark.parametrize('size', [(65, 97), (64, 48), (33, 31)])
def test_logits_have_the_images_size_and_are_float32(size):
    model = models.create('pspnet', num_classes=4, dtype='bfloat16', **SMALL['pspnet'])
    image = jax.random.normal(key(), (1, *size, 3))
    values = model.init(key(), image, train=False)
    logits = model.apply(values, image)['logits']
    assert logits.shape == (1, *size, 4)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(values))


def test_the_deep_stem_is_semsegs():
    _, shapes = variables('pspnet', 'resnet50', deep_stem=True)
    backbone = shapes['params']['backbone']
    assert [backbone[f'conv{i}']['kernel'].shape for i in (1, 2, 3)] == [
        (3, 3, 3, 64), (3, 3, 64, 64), (3, 3, 64, 128)
    ]  # fmt: skip
    assert backbone['layer1_0']['conv1']['kernel'].shape == (1, 1, 128, 64)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'name': 'pspnett', 'num_classes': 2}, "model 'pspnett' is not one of pspnet"),
        ({'name': 'pspnet', 'num_classes': 1}, 'needs num_classes=2'),
    ],
)
def test_create_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        models.create(**options)
