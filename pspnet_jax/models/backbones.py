"""Backbones: image -> {nominal stride: features}, at output stride 4, 8, 16 or 32.

VGG16 (Simonyan and Zisserman 2015, arXiv 1409.1556, configuration D), with and without
BatchNorm; ResNet (He et al. 2016, arXiv 1512.03385); MobileNetV2 (Sandler et al. 2018,
arXiv 1801.04381); EfficientNet-Lite0 to 4 (Tan and Le 2019, arXiv 1905.11946, as TensorFlow's
models/official/efficientnet/lite has it). Dilation as in Yu and Koltun 2016 and Zhao et al. 2017,
section 3.

A backbone returns the same keys for any output stride: the key is the stride that the undilated
network has there, and the true stride is min(key, output_stride). Decoders need not know which
backbone they have.

| key | VGG16             | ResNet | MobileNetV2 | Lite0    | channels of VGG, ResNet-50, these |
|-----|-------------------|--------|-------------|----------|-----------------------------------|
| 2   | pool1             | stem   | block 1     | block 0  | 64, 64, 16, 16                    |
| 4   | pool2             | layer1 | block 3     | block 2  | 128, 256, 24, 24                  |
| 8   | pool3             | layer2 | block 6     | block 4  | 256, 512, 32, 40                  |
| 16  | pool4 (see below) | layer3 | block 13    | block 10 | 512, 1024, 96, 112                |
| 32  | pool5 (see below) | layer4 | the head    | the head | 512, 2048, 1280, 1280             |

VGG16 also returns, at -2 .. -32, the blocks before they are pooled into 2 .. 32. At output stride
16 it leaves out pool5 (no convolution after it needs dilation); at 8 also pool4, and dilates block
5 by 2; at 4 also pool3, and dilates block 4 by 2 and block 5 by 4. Where a pool is left out, the
features are the block's own output. With `pool` 3 it pools by 3x3 as DeepLab's VGG16 does, and
keeps the pools that it would leave out, at stride 1.
"""

import inspect
import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from pspnet_jax.models.convolution import max_pool
from pspnet_jax.models.layers import units

OUTPUT_STRIDES = (4, 8, 16, 32)


class VGG16(nn.Module):
    """B H W C -> {2 .. 32, -2 .. -32: B h w C'}, C' = width * (1, 2, 4, 8, 8)."""

    output_stride: int = 32
    width: int = 64
    norm: bool = False  # BatchNorm after each convolution
    pool: int = 2  # window of the pooling, whose stride is 2
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv, norm = units(self, train)
        features, stride, dilation = {}, 1, 1
        for block, depth in enumerate((2, 2, 3, 3, 3), start=1):
            for i in range(1, depth + 1):
                wide = self.width * min(2 ** (block - 1), 8)
                x = conv(wide, dilation=dilation, use_bias=True, name=f'conv{block}_{i}')(x)
                x = nn.relu(norm(f'bn{block}_{i}')(x) if self.norm else x)
            features[-(2**block)] = x
            pad = self.pool // 2 if self.pool % 2 else 0
            if stride < self.output_stride:
                x = max_pool(x, self.pool, pad)
                stride *= 2
            else:
                dilation *= 2
                if self.pool % 2:
                    x = nn.max_pool(x, (self.pool,) * 2, (1, 1), ((pad, pad),) * 2)
            features[2**block] = x
        return features


class Residual(nn.Module):
    """Convolutions with BatchNorm after each and ReLU between them, and the shortcut."""

    convs: tuple[tuple[int, int, int, int], ...]  # features, kernel, stride, dilation of each
    project: bool  # whether the shortcut has a 1x1
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train: bool):
        conv, norm = units(self, train)
        y = x
        for i, (features, kernel, stride, dilation) in enumerate(self.convs, start=1):
            y = nn.relu(y) if i > 1 else y
            window = {'stride': stride, 'dilation': dilation}
            y = norm(f'bn{i}')(conv(features, kernel, **window, name=f'conv{i}')(y))
        if self.project:
            stride = math.prod(stride for _, _, stride, _ in self.convs)
            x = conv(features, 1, stride=stride, name='downsample')(x)
            x = norm('downsample_bn')(x)
        return nn.relu(x + y)


RESNETS = {
    'resnet18': (2, 2, 2, 2),
    'resnet34': (3, 4, 6, 3),
    'resnet50': (3, 4, 6, 3),
    'resnet101': (3, 4, 23, 3),
    'resnet152': (3, 8, 36, 3),
}
BASIC_RESNETS = ('resnet18', 'resnet34')  # blocks of two 3x3s; the others have bottlenecks


class ResNet(nn.Module):
    """B H W C -> {2, 4, 8, 16, 32: B h w C'}; `deep_stem` is semseg's three 3x3s.

    With `dilate_first_block` every 3x3 of a dilated layer has that layer's dilation (semseg, the
    paper's authors). Without it, the first block keeps the previous dilation (torchvision), and the
    network computes on its grid exactly what the strided one does. `multi_grid` multiplies the
    dilations of layer4's blocks, in order (DeepLab v3). `stride_in_1x1` puts a bottleneck's stride
    into its first 1x1, as He et al. and Keras do.
    """

    name_of_depth: str = 'resnet50'
    output_stride: int = 32
    width: int = 64
    deep_stem: bool = False
    dilate_first_block: bool = True
    stride_in_1x1: bool = False
    multi_grid: tuple[int, ...] = (1, 1, 1)
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv, norm = units(self, train)
        stem = [(self.width, 7, 2)]  # features, kernel, stride
        if self.deep_stem:
            stem = [(self.width, 3, 2), (self.width, 3, 1), (2 * self.width, 3, 1)]
        for i, (wide, kernel, stride) in enumerate(stem, start=1):
            x = conv(wide, kernel, stride=stride, name=f'conv{i}')(x)
            x = nn.relu(norm(f'bn{i}')(x))
        features = {2: x}
        x = max_pool(x, 3, 1)

        def convs(width, stride, dilation, next_dilation):
            if self.name_of_depth in BASIC_RESNETS:
                return (width, 3, stride, dilation), (width, 3, 1, next_dilation)
            first, second = (stride, 1) if self.stride_in_1x1 else (1, stride)
            return (width, 1, first, 1), (width, 3, second, dilation), (4 * width, 1, 1, 1)

        true_stride, dilation = 4, 1
        for layer, depth in enumerate(RESNETS[self.name_of_depth], start=1):
            width = self.width * 2 ** (layer - 1)
            stride, before = 1 if layer == 1 else 2, dilation
            if true_stride * stride > self.output_stride:
                stride, dilation = 1, 2 * dilation
            true_stride *= stride
            for i in range(depth):
                first = before if i == 0 and not self.dilate_first_block else dilation
                grid = self.multi_grid[i % len(self.multi_grid)] if layer == 4 else 1
                block = convs(width, stride if i == 0 else 1, first * grid, dilation * grid)
                project = i == 0 and (layer > 1 or x.shape[-1] != block[-1][0])
                shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
                x = Residual(block, project, **shared, name=f'layer{layer}_{i}')(x, train)
            features[2 ** (layer + 1)] = x
        return features


class InvertedResidual(nn.Module):
    """1x1 to `expand` times the channels -> depthwise -> linear 1x1, and the shortcut."""

    features: int
    expand: int
    kernel: int
    shortcut: bool
    stride: int
    dilation: int
    same_padding: bool
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train: bool):
        conv, norm = units(self, train)
        y, wide = x, self.expand * x.shape[-1]
        if self.expand > 1:
            y = nn.relu6(norm('expand_bn')(conv(wide, 1, name='expand')(y)))
        window = {'stride': self.stride, 'dilation': self.dilation}
        padded = {'same_padding': self.same_padding}
        y = conv(wide, self.kernel, **window, groups=wide, **padded, name='depthwise')(y)
        y = nn.relu6(norm('depthwise_bn')(y))
        y = norm('project_bn')(conv(self.features, 1, name='project')(y))
        return x + y if self.shortcut else y


class Stage(NamedTuple):
    """Blocks with the same channels; the first one has the stride."""

    expand: int
    channels: float  # rounded to a multiple of 8
    blocks: int
    stride: int
    kernel: int
    nominal: int  # total stride after it


MOBILENET_V2 = (
    Stage(1, 16, 1, 1, 3, 2),
    Stage(6, 24, 2, 2, 3, 4),
    Stage(6, 32, 3, 2, 3, 8),
    Stage(6, 64, 4, 2, 3, 16),
    Stage(6, 96, 3, 1, 3, 16),
    Stage(6, 160, 3, 2, 3, 32),
    Stage(6, 320, 1, 1, 3, 32),
)
EFFICIENTNET_LITE0 = (
    Stage(1, 16, 1, 1, 3, 2),
    Stage(6, 24, 2, 2, 3, 4),
    Stage(6, 40, 2, 2, 5, 8),
    Stage(6, 80, 3, 2, 3, 16),
    Stage(6, 112, 3, 1, 5, 16),
    Stage(6, 192, 4, 2, 5, 32),
    Stage(6, 320, 1, 1, 3, 32),
)


def lite(wide: float, deep: float) -> tuple[Stage, ...]:
    """Lite0 with `wide` times the channels and `deep` times the blocks.

    The first and the last stage keep their one block; stem and head keep their channels.
    """
    first, *between, last = (
        stage._replace(channels=wide * stage.channels) for stage in EFFICIENTNET_LITE0
    )
    between = [stage._replace(blocks=math.ceil(deep * stage.blocks)) for stage in between]
    return first, *between, last


LAYOUTS = {
    'mobilenet_v2': MOBILENET_V2,
    'efficientnet_lite0': EFFICIENTNET_LITE0,
    'efficientnet_lite1': lite(1.0, 1.1),
    'efficientnet_lite2': lite(1.1, 1.2),
    'efficientnet_lite3': lite(1.2, 1.4),
    'efficientnet_lite4': lite(1.4, 1.8),
}


class MobileNet(nn.Module):
    """B H W C -> {2, 4, 8, 16, 32: B h w C'}; `width` 64 is the published width 1.0.

    `dilate_first_block` as in `ResNet`: whether the depthwise convolution that lost its stride gets
    the new dilation. `same_padding` pads as TensorFlow does, which Keras' MobileNetV2 weights and
    all EfficientNet-Lite weights need.
    """

    name_of_layout: str = 'mobilenet_v2'
    output_stride: int = 32
    width: int = 64
    dilate_first_block: bool = True
    same_padding: bool = False
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv, norm = units(self, train)
        padded = {'same_padding': self.same_padding}

        def scaled(channels):  # to a multiple of 8, at least 90 % of the requested channels
            wanted = channels * self.width / 64
            nearest = max(8, int(wanted + 4) // 8 * 8)
            return nearest if nearest >= 0.9 * wanted else nearest + 8

        def conv_norm(x, features, kernel, stride, name):
            x = conv(features, kernel, stride=stride, **padded, name=name)(x)
            return nn.relu6(norm(f'{name}_bn')(x))

        x = conv_norm(x, scaled(32), 3, 2, 'stem')
        features, true_stride, dilation = {}, 2, 1
        number = int(self.name_of_layout == 'mobilenet_v2')  # of the block in published weights
        for stage in LAYOUTS[self.name_of_layout]:
            stride, before = stage.stride, dilation
            if true_stride * stride > self.output_stride:
                stride, dilation = 1, 2 * dilation
            true_stride *= stride
            for i in range(stage.blocks):
                x = InvertedResidual(
                    features=scaled(stage.channels),
                    expand=stage.expand,
                    kernel=stage.kernel,
                    shortcut=i > 0,
                    stride=stride if i == 0 else 1,
                    dilation=before if i == 0 and not self.dilate_first_block else dilation,
                    **padded,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f'block{number}',
                )(x, train)
                number += 1
            features[stage.nominal] = x
        # In the paper, narrower networks keep the head's 1280 channels; here the head shrinks too,
        # since a small width asks for a small network.
        features[32] = conv_norm(x, scaled(1280), 1, 1, 'head')
        return features


BACKBONES = {
    'vgg16': (VGG16, {}),
    'vgg16_bn': (VGG16, {'norm': True}),
    **{name: (ResNet, {'name_of_depth': name}) for name in RESNETS},
    **{
        name: (MobileNet, {'name_of_layout': name, 'same_padding': 'lite' in name})
        for name in LAYOUTS
    },
}
OWN_OPTIONS = {'deep_stem': 'ResNet', 'stride_in_1x1': 'ResNet', 'same_padding': 'mobilenet_v2'}


def create(name: str, *, output_stride: int, **options) -> nn.Module:
    """The backbone with this name; options that it does not have are ignored.

    Raises ValueError for an unknown name, an output stride other than OUTPUT_STRIDES, or an
    option that only another backbone has.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f'output_stride {output_stride} is not one of {OUTPUT_STRIDES}')
    if name not in BACKBONES:
        raise ValueError(f'backbone {name!r} is not one of {", ".join(BACKBONES)}')
    make, own = BACKBONES[name]
    known = inspect.signature(make).parameters
    for key, owner in OWN_OPTIONS.items():
        if options.get(key) and key not in known:
            raise ValueError(f'{key} is an option of {owner}: leave it as None for {name}')
    options = {key: value for key, value in options.items() if key in known}
    return make(output_stride=output_stride, **{**own, **options})
