"""Every network: its size, its dilation, its branches, any input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tables import PUBLISHED, PUBLISHED_OTHERWISE, read_lines
from pspnet_jax import models
from pspnet_jax.models import backbones, deeplab, dilated, fcn, refinenet
from pspnet_jax.runtime.compilation import jit
from tests.conftest import random_variables, slow_but

# Parameters for 2 and 21 classes on the network's own backbone. Update if a change was meant.
COUNTS = {
    'fcn32s': (134_268_738, 134_346_581),
    'fcn16s': (134_269_828, 134_364_410),
    'fcn8s': (134_270_406, 134_376_863),
    'fcn': (35_307_588, 35_322_218),
    'unet': (31_037_698, 31_038_933),
    'unet_mini': (467_202, 467_829),
    'segnet': (29_440_450, 29_451_413),
    'dilated': (134_269_010, 134_374_973),
    'deeplab_v1': (20_485_954, 20_505_429),
    'deeplab_v2': (42_647_624, 44_048_532),
    'refinenet': (109_762_882, 109_806_677),
    'pspnet': (48_943_172, 48_957_802),
    'deeplab_v3': (41_403_972, 41_413_738),
    'deeplab_v3plus': (26_691_250, 26_696_133),
    'vgg_pspnet_blog': (17_088_322, 17_175_893),
}
BACKBONE_COUNTS = {  # pyramid, heads and auxiliary of pspnet beside each backbone, 2 and 21
    'vgg16': (20_879_172, 20_893_802),
    'vgg16_bn': (20_887_620, 20_902_250),
    'resnet18': (16_751_172, 16_765_802),
    'resnet34': (26_859_332, 26_873_962),
    'resnet50': (48_943_172, 48_957_802),
    'resnet101': (67_935_300, 67_949_930),
    'resnet152': (83_578_948, 83_593_578),
    'mobilenet_v2': (15_885_572, 15_900_202),
    'efficientnet_lite0': (17_069_572, 17_084_202),
    'efficientnet_lite1': (17_834_244, 17_848_874),
    'efficientnet_lite2': (18_528_068, 18_542_698),
    'efficientnet_lite3': (20_669_956, 20_684_586),
    'efficientnet_lite4': (25_534_724, 25_549_354),
}


@functools.cache
def variables(name, num_classes=2, **options):
    model = models.create(name, num_classes=num_classes, **options)
    image = jnp.zeros((1, 33, 33, 3))
    return model, jax.eval_shape(functools.partial(model.init, train=False), key(), image)


def key():
    return jax.random.key(0)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', COUNTS)
def test_parameter_count(name):
    for num_classes, number in zip((2, 21), COUNTS[name], strict=True):
        _, shapes = variables(name, num_classes)
        assert count(shapes['params']) == number, 'if this was meant, update COUNTS in this file'


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    number, unit, _ = PUBLISHED[name]
    assert abs(COUNTS[name][1] - number) < unit


@pytest.mark.parametrize('backbone', BACKBONE_COUNTS)
def test_parameter_count_on_each_backbone(backbone):
    for num_classes, number in zip((2, 21), BACKBONE_COUNTS[backbone], strict=True):
        _, shapes = variables('pspnet', num_classes, backbone=backbone)
        assert count(shapes['params']) == number, 'if this was meant, update BACKBONE_COUNTS'


def test_the_tables_of_counts_are_complete():
    assert set(COUNTS) == set(models.MODELS)
    assert set(BACKBONE_COUNTS) == set(backbones.BACKBONES)


@pytest.mark.parametrize('line', read_lines('costs'), ids=lambda line: line['name'])
def test_the_readmes_table_has_these_counts(line):
    assert (line['parameters']['2'], line['parameters']['21']) == COUNTS[line['name']]


def test_every_network_has_its_cost_and_its_training_in_the_results():
    assert [line['name'] for line in read_lines('costs')] == list(models.MODELS)
    dice = {
        line['experiment'].removeprefix('phantom_'): line['summary']['dice']['mean']
        for line in read_lines('architectures')
    }
    assert set(dice) == set(models.MODELS)
    assert min(dice.values()) >= 0.8


@pytest.mark.parametrize(
    ('options', 'number'),
    [
        ({'name': 'fcn', 'backbone': 'resnet101'}, 54_314_346),
        ({'name': 'deeplab_v3', 'variant': 'torchvision'}, 42_004_074),
        ({'name': 'deeplab_v3', 'variant': 'torchvision', 'backbone': 'resnet101'}, 60_996_202),
    ],
)
def test_parameter_count_is_torchvisions(options, number):
    _, shapes = variables(num_classes=21, **options)
    assert count(shapes['params']) == number


def test_the_blogs_network_has_the_published_size_and_geometry():
    model, shapes = variables('vgg_pspnet_blog')
    assert count(shapes) == 17_093_442  # image-segmentation-keras counts BN statistics too
    assert PUBLISHED_OTHERWISE['vgg_pspnet_blog'].startswith('17,093,442')
    out = jax.eval_shape(model.apply, shapes, jnp.zeros((1, 384, 384, 3)))
    assert out['logits'].shape == (1, 96, 96, 2)


def test_backbone_sizes_are_the_published_ones():
    # torchvision's networks, and timm's EfficientNets, have a classifier of 1000 classes after the
    # same layers.
    published = {
        'vgg16': 138_357_544 - 123_642_856,
        'vgg16_bn': 138_365_992 - 123_642_856,
        'resnet18': 11_689_512 - 513_000,
        'resnet34': 21_797_672 - 513_000,
        'resnet50': 25_557_032 - 2_049_000,
        'resnet101': 44_549_160 - 2_049_000,
        'resnet152': 60_192_808 - 2_049_000,
        'mobilenet_v2': 3_504_872 - 1_281_000,
        'efficientnet_lite0': 4_652_008 - 1_281_000,
        'efficientnet_lite1': 5_416_680 - 1_281_000,
        'efficientnet_lite2': 6_092_072 - 1_281_000,
        'efficientnet_lite3': 8_197_096 - 1_281_000,
        'efficientnet_lite4': 13_006_568 - 1_281_000,
    }
    assert set(published) == set(backbones.BACKBONES)
    for name, expected in published.items():
        _, shapes = variables('pspnet', backbone=name)
        assert count(shapes['params']['backbone']) == expected


class Backbone(nn.Module):
    """A narrow backbone by name."""

    name_of: str
    options: dict

    @nn.compact
    def __call__(self, x):
        return backbones.create(self.name_of, width=8, **self.options)(x)


@pytest.mark.slow
@pytest.mark.parametrize('backbone', ['resnet18', 'resnet50', 'mobilenet_v2', 'efficientnet_lite0'])
@pytest.mark.parametrize('stride', [4, 8, 16])
def test_dilated_equals_strided_on_the_sub_grid(backbone, stride):
    """A dilated network computes at each of its cells what the strided one computes at its own."""
    image = jax.random.normal(key(), (1, 97, 65, 3))
    strided = Backbone(backbone, {'output_stride': 32})
    dilated = Backbone(backbone, {'output_stride': stride, 'dilate_first_block': False})
    values = jit(strided.init)(key(), image)
    coarse, fine = jit(strided.apply)(values, image), jit(dilated.apply)(values, image)
    for nominal in (4, 8, 16, 32):
        step = max(nominal // stride, 1)
        scale = float(jnp.abs(coarse[nominal]).max())
        np.testing.assert_allclose(
            coarse[nominal] / scale,
            fine[nominal][:, ::step, ::step] / scale,
            atol=1e-5 if stride > 4 else 2e-5,  # sums in other orders: 1.1e-5 was seen at 4
        )


@pytest.mark.slow
@pytest.mark.parametrize('pool', [2, 3])
def test_dilated_vgg_looks_as_far_as_the_strided_one(pool):
    """Without pool4, the three convolutions of block 5 reach two cells each, not one."""
    image = jnp.zeros((1, 256, 256, 3)).at[0, 128, 128].set(1.0)
    net = Backbone('vgg16', {'output_stride': 8, 'pool': pool})
    values = jit(net.init)(key(), image)
    positive = jax.tree.map(jnp.abs, values)  # so that nothing cancels and ReLU passes all
    lit = jit(net.apply)(positive, image)
    reach = {n: int((np.asarray(lit[n][0]).sum(-1).any(0)).sum()) for n in (8, 16, 32)}
    kept = 2 if pool == 3 else 0  # DeepLab's pool4 and pool5 stay, 3x3 at stride 1
    assert reach[16] - reach[8] == 2 * 3 + kept  # block 4: three dense 3x3s
    assert reach[32] - reach[16] == 2 * 3 * 2 + kept  # block 5: three at dilation 2


@pytest.mark.parametrize('backbone', backbones.BACKBONES)
@pytest.mark.parametrize('stride', backbones.OUTPUT_STRIDES)
def test_features_have_the_promised_strides(backbone, stride):
    net = Backbone(backbone, {'output_stride': stride})
    out, _ = jax.eval_shape(lambda x: net.init_with_output(key(), x), jnp.zeros((1, 96, 64, 3)))
    assert {nominal: out[nominal].shape[1:3] for nominal in (2, 4, 8, 16, 32)} == {
        nominal: (96 // min(nominal, stride), 64 // min(nominal, stride))
        for nominal in (2, 4, 8, 16, 32)
    }


@pytest.mark.slow
def test_multi_grid_multiplies_the_dilation_of_layer4():
    """A single bright pixel reaches further by layer4's four 3x3s, each dilated 2 * grid."""
    image = jnp.zeros((1, 1024, 32, 3)).at[0, 512, 16].set(1.0)

    def reach(grid):
        net = Backbone('resnet18', {'output_stride': 16, 'multi_grid': grid})
        positive = jax.tree.map(jnp.abs, jit(net.init)(key(), image))
        lit = jit(net.apply)(positive, image)
        before, behind = (np.count_nonzero(np.asarray(lit[n][0]).sum((1, 2))) for n in (16, 32))
        return behind - before

    assert reach((1, 1)) == 2 * 2 * (1 + 1 + 1 + 1)
    assert reach((1, 2, 4)) == 2 * 2 * (1 + 1 + 2 + 2)


# Narrow, so that a test takes seconds; each on its own backbone or a shallower one of the kind.
SMALL = {
    'fcn32s': {'fc_features': 16},
    'fcn16s': {'fc_features': 16},
    'fcn8s': {'fc_features': 16},
    'dilated': {'fc_features': 16, 'context': 'large'},
    'fcn': {'backbone': 'resnet18'},
    'pspnet': {'backbone': 'resnet18'},
    'deeplab_v2': {'backbone': 'resnet18'},
    'refinenet': {'backbone': 'resnet18'},
    'deeplab_v3': {'backbone': 'resnet18'},
    'deeplab_v3plus': {'backbone': 'resnet18'},
}


def small(name, **options):
    return models.create(name, **{'width': 8, 'dropout': 0.0, **SMALL.get(name, {}), **options})


@pytest.mark.parametrize(
    'name', slow_but([*models.MODELS, 'unet with deep supervision'], 'unet_mini', 'pspnet')
)
def test_every_parameter_reaches_the_output(name):
    name, deep, _ = name.partition(' with')
    model = small(name, num_classes=3, deep_supervision=bool(deep))
    image = jax.random.normal(key(), (2, 64, 64, 3))
    values = random_variables(model)

    def loss(params):
        out, _ = model.apply(
            {**values, 'params': params}, image, train=True, mutable=['batch_stats']
        )
        return sum((value * jnp.arange(1.0, 4.0)[None, None, None]).std() for value in out.values())

    grads = jit(jax.grad(loss))(values['params'])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.abs(grad).max() > 0, f'{jax.tree_util.keystr(path)} changes nothing'


@pytest.mark.newest
@pytest.mark.parametrize(
    'name', slow_but(sorted(set(models.MODELS) - {'vgg_pspnet_blog'}), 'unet_mini', 'pspnet')
)
def test_logits_have_the_images_size_in_bfloat16_too(name):
    model = small(name, num_classes=4, dtype='bfloat16')
    image = jax.random.normal(key(), (1, 49, 33, 5))
    logits = jit(model.apply)(random_variables(model, channels=5), image)['logits']
    assert logits.shape == (1, 49, 33, 4)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()
    shapes = jax.eval_shape(functools.partial(model.init, train=False), key(), image)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


@pytest.mark.slow
@pytest.mark.newest
def test_the_blogs_network_takes_odd_sizes_in_bfloat16_too():
    model = small('vgg_pspnet_blog', num_classes=4, dtype='bfloat16')
    image = jax.random.normal(key(), (1, 75, 97, 5))
    logits = jit(model.apply)(random_variables(model, channels=5), image)['logits']
    assert logits.shape == (1, 8 * 2, 8 * 3, 4)  # of whole cells of 32 pixels, a quarter
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()


@pytest.mark.parametrize(
    'backbone',
    slow_but(['resnet18', 'vgg16_bn', 'mobilenet_v2', 'efficientnet_lite0'], 'resnet18'),
)
def test_every_kind_of_backbone_under_every_decoder(backbone):
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    for name in models.MODELS:
        if name in ('unet_mini', 'vgg_pspnet_blog'):  # these have encoders of their own
            with pytest.raises(ValueError, match=r'use (unet|pspnet)'):
                small(name, num_classes=2, backbone=backbone)
            continue
        model = small(name, num_classes=2, backbone=backbone)
        out, _ = jax.eval_shape(lambda x, m=model: m.init_with_output(key(), x), image)
        assert out['logits'].shape == (1, 64, 96, 2), name


# image-segmentation-keras 0.3.0, its table of models.
THEIRS = [
    'fcn_8',
    'fcn_32',
    'fcn_8_vgg',
    'fcn_32_vgg',
    'fcn_8_resnet50',
    'fcn_32_resnet50',
    'fcn_8_mobilenet',
    'fcn_32_mobilenet',
    'pspnet',
    'vgg_pspnet',
    'resnet50_pspnet',
    'pspnet_50',
    'pspnet_101',
    'unet_mini',
    'unet',
    'vgg_unet',
    'resnet50_unet',
    'mobilenet_unet',
    'segnet',
    'vgg_segnet',
    'resnet50_segnet',
    'mobilenet_segnet',
]


def test_the_keras_tools_names_are_known():
    assert list(models.ALIASES) == THEIRS
    assert len(THEIRS) == 22
    for name in THEIRS:
        models.create(name, num_classes=2)
    assert models.resolve('vgg_unet')[1] == 'vgg16'
    with pytest.raises(ValueError, match='vgg_unet uses vgg16, not resnet50'):
        models.create('vgg_unet', num_classes=2, backbone='resnet50')


@pytest.mark.parametrize('size', ['basic', 'large'])
def test_the_untrained_context_module_passes_positive_scores_on(rng, size):
    scores = jnp.asarray(rng.uniform(0.5, 2.0, (1, 40, 40, 3)), jnp.float32)
    module = dilated.Context(size)
    out = module.apply(jit(module.init)(key(), scores), scores)
    np.testing.assert_allclose(out, scores, atol={'basic': 1e-6, 'large': 0.5}[size])
    assert np.abs(out - scores).mean() < 0.1


@pytest.mark.slow
def test_the_context_module_sees_67_cells():
    scores = jnp.ones((1, 99, 99, 2))
    module = dilated.Context('basic')
    values = jax.tree.map(jnp.ones_like, jit(module.init)(key(), scores))
    changed = module.apply(values, scores.at[0, 49, 49].set(2.0)) != module.apply(values, scores)
    assert int(np.asarray(changed[0, :, :, 0]).any(axis=0).sum()) == 67


def test_a_residual_unit_without_weights_is_the_identity(rng):
    x = jnp.asarray(rng.standard_normal((1, 9, 7, 4)), jnp.float32)
    unit = refinenet.ResidualConvUnit()
    zeros = jax.tree.map(jnp.zeros_like, unit.init(key(), x))
    np.testing.assert_array_equal(unit.apply(zeros, x), x)


def test_chained_pooling_reaches_two_poolings_far(rng):
    """Two 5x5 maxima and 3x3s of centre weights alone: the bright cell spreads by 4, no more."""
    x = jnp.zeros((1, 21, 21, 1)).at[0, 10, 10].set(1.0)
    chain = refinenet.ChainedResidualPooling()
    centre = jax.tree.map(jnp.zeros_like, chain.init(key(), x))
    for name in ('conv1', 'conv2'):
        kernel = centre['params'][name]['kernel'].at[1, 1].set(1.0)
        centre['params'][name]['kernel'] = kernel
    out = np.asarray(chain.apply(centre, x)[0, :, :, 0])
    expected = np.zeros((21, 21))
    expected[6:15, 6:15] += 1
    expected[8:13, 8:13] += 1
    expected[10, 10] += 1
    np.testing.assert_array_equal(out, expected)


def lit_rows(module, x, *, train=False):
    """Rows through the middle that a bright middle cell changes, all weights being 1."""
    values = jax.tree.map(jnp.ones_like, module.init(key(), x, train))
    middle = x.shape[1] // 2, x.shape[2] // 2
    dark, bright = (
        np.asarray(module.apply(values, x.at[0, *middle].add(more), train)) for more in (0.0, 1.0)
    )
    return np.flatnonzero((dark != bright)[0, :, middle[1]].any(-1)) - middle[0]


@pytest.mark.parametrize('fc_features', [0, 4])
def test_the_branches_of_deeplab_v2_look_at_their_rates_and_add(fc_features):
    x = jnp.ones((1, 61, 61, 3))
    both = deeplab.SummedASPP(2, (6, 24), fc_features)
    assert lit_rows(both, x).tolist() == [-24, -6, 0, 6, 24]
    image = jax.random.normal(key(), x.shape)
    values = both.init(key(), image, False)
    alone = [deeplab.SummedASPP(2, (rate,), fc_features) for rate in (6, 24)]
    np.testing.assert_allclose(
        both.apply(values, image, False),
        sum(
            module.apply(
                {'params': {k: v for k, v in values['params'].items() if k.endswith(str(rate))}},
                image,
                False,
            )
            for module, rate in zip(alone, (6, 24), strict=True)
        ),
        atol=1e-5,
    )


@pytest.mark.parametrize('separable', [False, True])
def test_the_aspp_looks_at_its_rates_and_at_the_whole_image(separable):
    x = jnp.ones((1, 31, 31, 3))
    aspp = deeplab.ASPP(4, (6, 12), separable=separable)
    rows = lit_rows(aspp, x)
    assert rows.tolist() == list(range(-15, 16))  # the mean of the image is everywhere
    values = jax.tree.map(jnp.ones_like, aspp.init(key(), x, False))
    for name in ('conv', 'bn'):
        values['params']['image'][name] = jax.tree.map(
            jnp.zeros_like, values['params']['image'][name]
        )
    changed = aspp.apply(values, x.at[0, 15, 15].add(1.0), False) != aspp.apply(values, x, False)
    assert (np.flatnonzero(changed[0, :, 15, 0]) - 15).tolist() == [-12, -6, 0, 6, 12]


def test_fc6_is_a_dilated_convolution_of_its_kernel():
    x = jnp.ones((1, 61, 61, 2))
    assert lit_rows(fcn.FullyConnected(4, kernel=3, dilation=12), x).tolist() == [-12, 0, 12]
    rows = [-12, -8, -4, 0, 4, 8, 12]
    assert lit_rows(fcn.FullyConnected(4, kernel=7, dilation=4), x).tolist() == rows


def test_the_largest_score_of_all_scales_wins():
    """DeepLab v2: the fused scores are at least those of each scale, and one scale's."""
    model = small('deeplab_v2', num_classes=3)
    image = jax.random.normal(key(), (1, 64, 64, 3))
    out, _ = jit(
        functools.partial(model.apply, train=True, mutable=['batch_stats'])
    )(random_variables(model), image)  # fmt: skip
    scales = np.stack([value for name, value in out.items() if name != 'logits'])
    assert len(scales) == 3
    np.testing.assert_allclose(out['logits'], scales.max(axis=0), atol=1e-6)


def test_segnet_on_a_backbone_without_indices_still_decodes():
    model = small('segnet', num_classes=2, backbone='resnet18')
    out, _ = jax.eval_shape(lambda x: model.init_with_output(key(), x), jnp.zeros((1, 50, 70, 3)))
    assert out['logits'].shape == (1, 50, 70, 2)


def test_the_deep_stem_is_semsegs():
    _, shapes = variables('pspnet', backbone='resnet50', deep_stem=True)
    backbone = shapes['params']['backbone']
    assert [backbone[f'conv{i}']['kernel'].shape for i in (1, 2, 3)] == [
        (3, 3, 3, 64), (3, 3, 64, 64), (3, 3, 64, 128)
    ]  # fmt: skip
    assert backbone['layer1_0']['conv1']['kernel'].shape == (1, 1, 128, 64)


DEEP = {  # options, and the channels of the decoder at strides 2, 4, 8
    'unet': ({'name': 'unet'}, (16, 32, 64)),
    'unet_mini': ({'name': 'unet_mini'}, (8,)),
    'on resnet18': ({'name': 'unet', 'backbone': 'resnet18'}, (4, 8, 16)),
}


@pytest.mark.parametrize('name', DEEP)
def test_deep_supervision_adds_heads_of_the_images_size_in_training_alone(name):
    options, channels = DEEP[name]
    plain, deep = (
        models.create(num_classes=3, width=8, deep_supervision=on, **options)
        for on in (False, True)
    )
    image = jax.ShapeDtypeStruct((2, 75, 49, 3), jnp.float32)
    without, values = (
        jax.eval_shape(functools.partial(net.init, train=False), key(), image)
        for net in (plain, deep)
    )
    added = count(values['params']) - count(without['params'])
    assert added == sum(3 * c + 3 for c in channels)
    out, _ = jax.eval_shape(
        functools.partial(deep.apply, train=True, mutable=['batch_stats'], rngs={'dropout': key()}),
        values, image,
    )  # fmt: skip
    heads = {f'deep{2**i}' for i in range(1, len(channels) + 1)}
    assert set(out) == {'logits', *heads}
    assert {value.shape for value in out.values()} == {(2, 75, 49, 3)}
    assert set(jax.eval_shape(functools.partial(deep.apply, train=False), values, image)) == {
        'logits'
    }


def test_the_coarser_heads_see_the_image_where_it_is():
    """The middle of what a bright pixel lights, on the mean of its places within a cell."""
    net = models.create('unet_mini', num_classes=2, width=4, batch_norm=False, dropout=0.0,
                        deep_supervision=True)  # fmt: skip
    image = jnp.zeros((4, 96, 96, 1))
    places = np.arange(20, 24)  # far from the middle, where any way of enlarging fits
    image = image.at[np.arange(4), places, places].set(1.0)
    shapes = jax.eval_shape(functools.partial(net.init, train=False), key(), image)
    values = jax.tree.map(lambda x: jnp.full(x.shape, float(x.ndim > 1)), shapes)
    out = jit(functools.partial(net.apply, train=True))(values, image)
    for name in ('logits', 'deep2'):
        lit = np.asarray(out[name][..., 0], np.float64)
        for axis in (1, 2):
            share = lit.sum(3 - axis) / lit.sum((1, 2))[:, None]
            assert (share @ np.arange(96) - places).mean() == pytest.approx(0, abs=0.02), name


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'name': 'pspnett', 'num_classes': 2}, "model 'pspnett' is not one of fcn32s"),
        ({'name': 'pspnet', 'num_classes': 1}, 'needs num_classes=2'),
        ({'name': 'pspnet', 'num_classes': 2, 'backbone': 'vgg19'}, "'vgg19' is not one of vgg16"),
        (
            {'name': 'pspnet', 'num_classes': 2, 'output_stride': 12},
            'output_stride 12 is not one of',
        ),
        ({'name': 'fcn8s', 'num_classes': 2, 'output_stride': 8}, 'has output stride 32, not 8'),
        ({'name': 'fcn', 'num_classes': 2, 'variant': 'smp'}, "not for fcn: use 'paper'"),
        (
            {'name': 'fcn8s', 'num_classes': 2, 'deep_stem': True},
            'deep_stem is an option of ResNet: leave',
        ),
    ],
)
def test_create_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        models.create(**options)


def test_pspnet_without_bins_has_no_pyramid(rng):
    """Its head sees the features, and nothing else is there: the ablation of the paper."""
    image = rng.normal(size=(1, 33, 33, 3)).astype(np.float32)
    shapes = {}
    for bins in ((), (1, 2)):
        model = models.create('pspnet', num_classes=2, width=8, backbone='resnet18', bins=bins)
        variables = jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x), image)
        shapes[bins] = variables['params']
        assert ('pyramid' in shapes[bins]) == bool(bins)
    sizes = {
        bins: sum(x.size for x in jax.tree.leaves(found['head'])) for bins, found in shapes.items()
    }
    features = 8 * 8  # channels of a ResNet-18's layer4 of this width
    assert sizes[(1, 2)] - sizes[()] == 3 * 3 * features * (8 * 8)  # what it sees of the pyramid
