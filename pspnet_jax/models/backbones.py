"""Backbones: image -> {nominal stride: features}, at output stride 8, 16 or 32.

VGG16 (Simonyan and Zisserman 2015, arXiv 1409.1556, configuration D), with and without
BatchNorm; ResNet (He et al. 2016, arXiv 1512.03385); MobileNetV2 (Sandler et al. 2018,
arXiv 1801.04381); EfficientNet-Lite0 to 4 (Tan and Le 2019, arXiv 1905.11946, as TensorFlow's
models/official/efficientnet/lite has it). Dilation as in Yu and Koltun 2016 and Zhao et al. 2017,
section 3.

A backbone returns the same dictionary whatever its output stride: the key is the
stride that the undilated network has there, the value's true stride is
min(key, output_stride). No decoder needs to know which backbone it stands on.

| key | VGG16             | ResNet | MobileNetV2 | Lite0    | channels of VGG, ResNet-50, these |
|-----|-------------------|--------|-------------|----------|-----------------------------------|
| 2   | pool1             | stem   | block 1     | block 0  | 64, 64, 16, 16                    |
| 4   | pool2             | layer1 | block 3     | block 2  | 128, 256, 24, 24                  |
| 8   | pool3             | layer2 | block 6     | block 4  | 256, 512, 32, 40                  |
| 16  | pool4 (see below) | layer3 | block 13    | block 10 | 512, 1024, 96, 112                |
| 32  | pool5 (see below) | layer4 | the head    | the head | 512, 2048, 1280, 1280             |

VGG16 also gives, at -2 .. -32, what was pooled into 2 .. 32: the blocks themselves. At output
stride 8 it leaves out pool4 and pool5 and dilates block 5 by 2, at 16 it leaves out pool5
(there is no convolution behind it to dilate); so features 16 and 32 are then the
outputs of blocks 4 and 5 themselves. With `pool` 3 it pools as DeepLab's VGG16 does, 3x3,
and keeps the pools that it would leave out, at stride 1.
"""

import inspect
import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from pspnet_jax.models.convolution import max_pool
from pspnet_jax.models.layers import batch_norm, conv

OUTPUT_STRIDES = (8, 16, 32)


class VGG16(nn.Module):
    """B H W C -> {2 .. 32, -2 .. -32: B h w C'}, C' = width * (1, 2, 4, 8, 8)."""

    output_stride: int = 32
    width: int = 64
    norm: bool = False  # BatchNorm behind each convolution
    pool: int = 2  # its window; its stride is 2
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        features = {}
        stride, dilation = 1, 1
        for block, depth in enumerate((2, 2, 3, 3, 3), start=1):
            for i in range(1, depth + 1):
                x = conv(
                    self.width * min(2 ** (block - 1), 8),
                    dilation=dilation,
                    use_bias=True,
                    dtype=self.dtype,
                    name=f'conv{block}_{i}',
                )(x)
                if self.norm:
                    x = batch_norm(train, self.dtype, self.axis_name, f'bn{block}_{i}')(x)
                x = nn.relu(x)
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


class Bottleneck(nn.Module):
    """1x1 -> 3x3 (stride, dilation) -> 1x1 of 4x the width, and the shortcut."""

    width: int
    stride: int
    dilation: int
    project: bool
    stride_in_1x1: bool
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(name):
            return batch_norm(train, self.dtype, self.axis_name, name)

        first, second = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
        y = conv(self.width, 1, stride=first, dtype=self.dtype, name='conv1')(x)
        y = nn.relu(norm('bn1')(y))
        y = conv(self.width, stride=second, dilation=self.dilation, dtype=self.dtype, name='conv2')(
            y
        )
        y = nn.relu(norm('bn2')(y))
        y = norm('bn3')(conv(4 * self.width, 1, dtype=self.dtype, name='conv3')(y))
        if self.project:
            x = conv(4 * self.width, 1, stride=self.stride, dtype=self.dtype, name='downsample')(x)
            x = norm('downsample_bn')(x)
        return nn.relu(x + y)


class BasicBlock(nn.Module):
    """3x3 (stride, dilation) -> 3x3 (next dilation), and the shortcut."""

    width: int
    stride: int
    dilation: int
    next_dilation: int
    project: bool
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(name):
            return batch_norm(train, self.dtype, self.axis_name, name)

        y = conv(
            self.width, stride=self.stride, dilation=self.dilation, dtype=self.dtype, name='conv1'
        )(x)
        y = nn.relu(norm('bn1')(y))
        y = conv(self.width, dilation=self.next_dilation, dtype=self.dtype, name='conv2')(y)
        y = norm('bn2')(y)
        if self.project:
            x = conv(self.width, 1, stride=self.stride, dtype=self.dtype, name='downsample')(x)
            x = norm('downsample_bn')(x)
        return nn.relu(x + y)


RESNETS = {
    'resnet18': (2, 2, 2, 2),
    'resnet34': (3, 4, 6, 3),
    'resnet50': (3, 4, 6, 3),
    'resnet101': (3, 4, 23, 3),
    'resnet152': (3, 8, 36, 3),
}


class ResNet(nn.Module):
    """B H W C -> {2, 4, 8, 16, 32: B h w C'}; `deep_stem` is semseg's three 3x3s.

    With `dilate_first_block` every 3x3 of a dilated layer has that layer's dilation
    (semseg, the paper's authors). Without, the first block keeps the dilation before it
    (torchvision): then the network computes on its grid exactly what the strided one does.
    `multi_grid` multiplies the dilation of layer4's blocks in turn (DeepLab v3).
    `stride_in_1x1` puts a bottleneck's stride where He et al. and Keras have it.
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
        def norm(name):
            return batch_norm(train, self.dtype, self.axis_name, name)

        if self.deep_stem:
            widths, strides = (self.width, self.width, 2 * self.width), (2, 1, 1)
            for i, (width, stride) in enumerate(zip(widths, strides, strict=True), start=1):
                x = conv(width, stride=stride, dtype=self.dtype, name=f'conv{i}')(x)
                x = nn.relu(norm(f'bn{i}')(x))
        else:
            x = conv(self.width, 7, stride=2, dtype=self.dtype, name='conv1')(x)
            x = nn.relu(norm('bn1')(x))
        features = {2: x}
        x = max_pool(x, 3, 1)

        bottleneck = self.name_of_depth not in ('resnet18', 'resnet34')
        shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
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
                block = {
                    'width': width,
                    'stride': stride if i == 0 else 1,
                    'dilation': first * grid,
                    'project': i == 0
                    and (layer > 1 or x.shape[-1] != (4 if bottleneck else 1) * width),
                    'name': f'layer{layer}_{i}',
                    **shared,
                }
                if bottleneck:
                    x = Bottleneck(stride_in_1x1=self.stride_in_1x1, **block)(x, train)
                else:
                    x = BasicBlock(next_dilation=dilation * grid, **block)(x, train)
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
        def norm(name, x):
            return batch_norm(train, self.dtype, self.axis_name, name)(x)

        y, wide = x, self.expand * x.shape[-1]
        if self.expand > 1:
            y = conv(wide, 1, dtype=self.dtype, name='expand')(y)
            y = nn.relu6(norm('expand_bn', y))
        y = conv(
            wide,
            self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            groups=wide,
            same_padding=self.same_padding,
            dtype=self.dtype,
            name='depthwise',
        )(y)
        y = nn.relu6(norm('depthwise_bn', y))
        y = norm('project_bn', conv(self.features, 1, dtype=self.dtype, name='project')(y))
        return x + y if self.shortcut else y


class Stage(NamedTuple):
    """Blocks of the same channels; the first one has the stride."""

    expand: int
    channels: float  # rounded to a multiple of 8
    blocks: int
    stride: int
    kernel: int
    nominal: int  # the stride behind it, from the image on


class Layout(NamedTuple):
    stages: tuple[Stage, ...]
    first: int  # number of the first block, as in the published weights


MOBILENET_V2 = Layout(
    (
        Stage(1, 16, 1, 1, 3, 2),
        Stage(6, 24, 2, 2, 3, 4),
        Stage(6, 32, 3, 2, 3, 8),
        Stage(6, 64, 4, 2, 3, 16),
        Stage(6, 96, 3, 1, 3, 16),
        Stage(6, 160, 3, 2, 3, 32),
        Stage(6, 320, 1, 1, 3, 32),
    ),
    first=1,
)
EFFICIENTNET_LITE0 = Layout(
    (
        Stage(1, 16, 1, 1, 3, 2),
        Stage(6, 24, 2, 2, 3, 4),
        Stage(6, 40, 2, 2, 5, 8),
        Stage(6, 80, 3, 2, 3, 16),
        Stage(6, 112, 3, 1, 5, 16),
        Stage(6, 192, 4, 2, 5, 32),
        Stage(6, 320, 1, 1, 3, 32),
    ),
    first=0,
)


def lite(wide: float, deep: float) -> Layout:
    """Lite0 with `wide` times the channels and `deep` times the blocks; the first and the last
    stage keep their one block, and stem and head their channels.
    """
    first, *between, last = (
        stage._replace(channels=wide * stage.channels) for stage in EFFICIENTNET_LITE0.stages
    )
    between = [stage._replace(blocks=math.ceil(deep * stage.blocks)) for stage in between]
    return EFFICIENTNET_LITE0._replace(stages=(first, *between, last))


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

    `dilate_first_block` as in `ResNet`: whether the depthwise convolution that has lost its stride
    takes the new dilation. `same_padding` pads as TensorFlow does: Keras' weights of MobileNetV2
    want it, and all of EfficientNet-Lite's.
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
        shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
        padded = {'same_padding': self.same_padding}

        def scaled(channels):  # to a multiple of 8, not below 90 % of what was asked for
            wanted = channels * self.width / 64
            nearest = max(8, int(wanted + 4) // 8 * 8)
            return nearest if nearest >= 0.9 * wanted else nearest + 8

        def conv_norm(x, features, kernel, stride, name):
            x = conv(features, kernel, stride=stride, **padded, dtype=self.dtype, name=name)(x)
            return nn.relu6(batch_norm(train, **shared, name=f'{name}_bn')(x))

        layout = LAYOUTS[self.name_of_layout]
        x = conv_norm(x, scaled(32), 3, 2, 'stem')
        features, true_stride, dilation, number = {}, 2, 1, layout.first
        for stage in layout.stages:
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
                    name=f'block{number}',
                    **padded,
                    **shared,
                )(x, train)
                number += 1
            features[stage.nominal] = x
        # Narrower than published, the head keeps its 1280 channels in the paper; here it
        # shrinks too, since small networks are what a small width is asked for.
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
    """The backbone called `name`; options that it does not have are left out.

    Raises ValueError for an unknown name, an output stride other than 8, 16 or 32, or an
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
