"""Dilated VGG16 and ResNet: image -> {nominal stride: features}.

Simonyan and Zisserman 2015 (arXiv 1409.1556), configuration D; He et al. 2016
(arXiv 1512.03385), with the stride in the 3x3 convolution as torchvision and
semseg have it. Dilation as in Yu and Koltun 2016 and Zhao et al. 2017, section 3.

A backbone returns the same dictionary whatever its output stride: the key is the
stride that the undilated network has there, the value's true stride is
min(key, output_stride). No decoder needs to know which backbone it stands on.

| key | VGG16                | ResNet  |
|-----|----------------------|---------|
| 2   | pool1                | stem    |
| 4   | pool2                | layer1  |
| 8   | pool3                | layer2  |
| 16  | pool4 (see below)    | layer3  |
| 32  | pool5 (see below)    | layer4  |

VGG16 at output stride 8 leaves out pool4 and pool5 and dilates block 5 by 2, at
16 it leaves out pool5 (there is no convolution behind it to dilate); so features
16 and 32 are then the outputs of blocks 4 and 5 themselves.
"""

import flax.linen as nn
import jax.numpy as jnp

from pspnet_jax.models.layers import batch_norm, conv

OUTPUT_STRIDES = (8, 16, 32)


class VGG16(nn.Module):
    """B H W C -> {2, 4, 8, 16, 32: B h w C'}, C' = width * (1, 2, 4, 8, 8)."""

    output_stride: int = 8
    width: int = 64
    dtype: jnp.dtype = jnp.float32

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
                x = nn.relu(x)
            if stride < self.output_stride:
                x = nn.max_pool(x, (2, 2), (2, 2))
                stride *= 2
            else:
                dilation *= 2
            features[2**block] = x
        return features


class Bottleneck(nn.Module):
    """1x1 -> 3x3 (stride, first dilation) -> 1x1 of 4x the width, and the shortcut."""

    width: int
    stride: int
    first_dilation: int
    dilation: int
    project: bool
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(name):
            return batch_norm(train, self.dtype, self.axis_name, name)

        y = conv(self.width, 1, dtype=self.dtype, name='conv1')(x)
        y = nn.relu(norm('bn1')(y))
        y = conv(
            self.width,
            stride=self.stride,
            dilation=self.first_dilation,
            dtype=self.dtype,
            name='conv2',
        )(y)
        y = nn.relu(norm('bn2')(y))
        y = norm('bn3')(conv(4 * self.width, 1, dtype=self.dtype, name='conv3')(y))
        if self.project:
            x = conv(4 * self.width, 1, stride=self.stride, dtype=self.dtype, name='downsample')(x)
            x = norm('downsample_bn')(x)
        return nn.relu(x + y)


class BasicBlock(nn.Module):
    """3x3 (stride, first dilation) -> 3x3 (dilation), and the shortcut."""

    width: int
    stride: int
    first_dilation: int
    dilation: int
    project: bool
    dtype: jnp.dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(name):
            return batch_norm(train, self.dtype, self.axis_name, name)

        y = conv(
            self.width,
            stride=self.stride,
            dilation=self.first_dilation,
            dtype=self.dtype,
            name='conv1',
        )(x)
        y = nn.relu(norm('bn1')(y))
        y = conv(self.width, dilation=self.dilation, dtype=self.dtype, name='conv2')(y)
        y = norm('bn2')(y)
        if self.project:
            x = conv(self.width, 1, stride=self.stride, dtype=self.dtype, name='downsample')(x)
            x = norm('downsample_bn')(x)
        return nn.relu(x + y)


RESNETS = {
    'resnet18': (BasicBlock, 1, (2, 2, 2, 2)),
    'resnet34': (BasicBlock, 1, (3, 4, 6, 3)),
    'resnet50': (Bottleneck, 4, (3, 4, 6, 3)),
    'resnet101': (Bottleneck, 4, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """B H W C -> {2, 4, 8, 16, 32: B h w C'}; `deep_stem` is semseg's three 3x3s.

    With `dilate_first_block` every 3x3 of a dilated layer has that layer's dilation
    (semseg, the paper's authors). Without, the first block keeps the dilation before it
    (torchvision): then the network computes on its grid exactly what the strided one does.
    """

    name_of_depth: str = 'resnet50'
    output_stride: int = 8
    width: int = 64
    deep_stem: bool = False
    dilate_first_block: bool = True
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
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

        block, expansion, depths = RESNETS[self.name_of_depth]
        true_stride, dilation = 4, 1
        for layer, depth in enumerate(depths, start=1):
            width = self.width * 2 ** (layer - 1)
            stride = 1 if layer == 1 else 2
            first_dilation = dilation
            if true_stride * stride > self.output_stride:
                stride, dilation = 1, 2 * dilation
            if self.dilate_first_block:
                first_dilation = dilation
            true_stride *= stride
            for i in range(depth):
                x = block(
                    width=width,
                    stride=stride if i == 0 else 1,
                    first_dilation=dilation if i else first_dilation,
                    dilation=dilation,
                    project=i == 0 and (layer > 1 or x.shape[-1] != expansion * width),
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f'layer{layer}_{i}',
                )(x, train)
            features[2 ** (layer + 1)] = x
        return features


BACKBONES = ('vgg16', *RESNETS)


def create(
    name: str,
    *,
    output_stride: int,
    width: int = 64,
    deep_stem: bool = False,
    dilate_first_block: bool = True,
    dtype: jnp.dtype = jnp.float32,
    axis_name: str | None = None,
) -> nn.Module:
    """The backbone called `name`, as submodule 'backbone' of the model that calls.

    Raises ValueError for an unknown name, an output stride other than 8, 16 or 32,
    or a deep stem on VGG16.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f'output_stride {output_stride} is not one of {OUTPUT_STRIDES}')
    if name == 'vgg16':
        if deep_stem:
            raise ValueError('deep_stem is a ResNet option: set it to False for vgg16')
        return VGG16(output_stride, width, dtype, name='backbone')
    if name not in RESNETS:
        raise ValueError(f'backbone {name!r} is not one of {", ".join(BACKBONES)}')
    return ResNet(
        name,
        output_stride,
        width,
        deep_stem,
        dilate_first_block,
        dtype,
        axis_name,
        name='backbone',
    )
