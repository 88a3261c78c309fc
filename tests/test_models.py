"""Every network: its size, its dilation, its branches, any input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import models
from pspnet_jax.models import backbones

# Parameters for 2 and 21 classes. If you meant to change a network, update this table.
COUNTS = {
    ('pspnet', 'vgg16'): (20_879_172, 20_893_802),
    ('pspnet', 'resnet18'): (16_751_172, 16_765_802),
    ('pspnet', 'resnet34'): (26_859_332, 26_873_962),
    ('pspnet', 'resnet50'): (48_943_172, 48_957_802),
    ('pspnet', 'resnet101'): (67_935_300, 67_949_930),
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


class Backbone(nn.Module):
    """`backbones.create` makes a submodule: this is the module around it."""

    name_of: str
    options: dict

    @nn.compact
    def __call__(self, x):
        return backbones.create(self.name_of, width=8, **self.options)(x)


@pytest.mark.parametrize('backbone', ['resnet18', 'resnet50'])
@pytest.mark.parametrize('stride', [8, 16])
def test_dilated_equals_strided_on_the_sub_grid(backbone, stride):
    """A dilated network computes at each of its cells what the strided one computes at its own."""
    image = jax.random.normal(key(), (1, 97, 65, 3))
    strided = Backbone(backbone, {'output_stride': 32})
    dilated = Backbone(backbone, {'output_stride': stride, 'dilate_first_block': False})
    values = jax.jit(strided.init)(key(), image)
    coarse, fine = jax.jit(strided.apply)(values, image), jax.jit(dilated.apply)(values, image)
    for nominal in (8, 16, 32):
        step = max(nominal // stride, 1)
        scale = float(jnp.abs(coarse[nominal]).max())
        np.testing.assert_allclose(
            coarse[nominal] / scale, fine[nominal][:, ::step, ::step] / scale, atol=1e-5
        )


def test_dilated_vgg_looks_as_far_as_the_strided_one():
    """Without pool4, the three convolutions of block 5 reach two cells each, not one."""
    image = jnp.zeros((1, 256, 256, 3)).at[0, 128, 128].set(1.0)
    net = Backbone('vgg16', {'output_stride': 8})
    values = jax.jit(net.init)(key(), image)
    positive = jax.tree.map(jnp.abs, values)  # so that nothing cancels and ReLU passes all
    lit = jax.jit(net.apply)(positive, image)
    reach = {n: int((np.asarray(lit[n][0]).sum(-1).any(0)).sum()) for n in (8, 16, 32)}
    assert reach[16] - reach[8] == 2 * 3  # block 4: three dense 3x3s
    assert reach[32] - reach[16] == 2 * 3 * 2  # block 5: three at dilation 2


@pytest.mark.parametrize('backbone', backbones.BACKBONES)
@pytest.mark.parametrize('stride', backbones.OUTPUT_STRIDES)
def test_features_have_the_promised_strides(backbone, stride):
    net = Backbone(backbone, {'output_stride': stride})
    out, _ = jax.eval_shape(lambda x: net.init_with_output(key(), x), jnp.zeros((1, 96, 64, 3)))
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
    values = jax.jit(functools.partial(model.init, train=False))(key(), image)

    def loss(params):
        out, _ = model.apply(
            {**values, 'params': params}, image, train=True, mutable=['batch_stats']
        )
        return sum((value * jnp.arange(1.0, 4.0)[None, None, None]).std() for value in out.values())

    grads = jax.jit(jax.grad(loss))(values['params'])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.abs(grad).max() > 0, f'{jax.tree_util.keystr(path)} changes nothing'


@pytest.mark.parametrize('size', [(65, 97), (64, 48), (33, 31)])
def test_logits_have_the_images_size_and_are_float32(size):
    model = models.create('pspnet', num_classes=4, dtype='bfloat16', **SMALL['pspnet'])
    image = jax.random.normal(key(), (1, *size, 3))
    values = jax.jit(functools.partial(model.init, train=False))(key(), image)
    logits = jax.jit(model.apply)(values, image)['logits']
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
