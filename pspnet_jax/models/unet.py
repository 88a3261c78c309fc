"""U-Net (Ronneberger, Fischer and Brox 2015, arXiv 1505.04597).

`UNet` is figure 1: 64 to 1024 features, two 3x3s a level, max pooling down, 2x2 transposed
convolutions up, skips concatenated, dropout at the end of the contracting path.
Deviations: the convolutions are padded, so the output has the image's size; the image is padded at
its bottom and right edges to a multiple of 16; BatchNorm follows each convolution unless
`batch_norm` is off (the paper has none). `unet_mini` has 2 levels from 32 features.

`BackboneUNet` puts the decoder on a classifier's features, as segmentation_models_pytorch
0.6 does (its `Unet`, the same numbers): nearest upsampling to the size of the skip, skips at
strides 16, 8, 4, 2, none at 1; from VGG16 each block as it is before its pooling, and two
more 3x3s at the bottom (`center`).

With `deep_supervision` the decoder's features at strides 2, 4 and 8 have 1x1 classifiers too, in
training only, as in nnU-Net (Isensee et al. 2021). Deviations: their logits are enlarged to the
image's size, where they meet every label, as those of PSPNet's auxiliary head are; all have the
weight loss.aux, where nnU-Net halves it with each level.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pspnet_jax.models.convolution import (
    CONVOLVED,
    conv3x3_of_doubled,
    conv_general_dilated,
    is_static,
    max_pool,
)
from pspnet_jax.models.layers import (
    HE_NORMAL,
    ConvNorm,
    DoubleSize,
    Dropout,
    pad_to_multiple,
    resize,
    resize_nearest,
    score,
    units,
)


class UNet(nn.Module):
    """B H W C -> {'logits': B H W K, and in training 'deep2' ...: B H W K}, float32."""

    num_classes: int
    width: int = 64
    levels: tuple[float, ...] = (1, 2, 4, 8, 16)  # features of each, times the width
    batch_norm: bool = True
    dropout: float = 0.5
    deep_supervision: bool = False
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        conv, norm = units(self, train)

        def two_convs(x, features, name):
            for i in (1, 2):
                x = conv(features, use_bias=not self.batch_norm, name=f'{name}_conv{i}')(x)
                x = nn.relu(norm(f'{name}_bn{i}')(x) if self.batch_norm else x)
            return x

        H, W = image.shape[1:3]
        *widths, deepest = (int(self.width * level) for level in self.levels)
        x = pad_to_multiple(image, 2 ** len(widths)).astype(self.dtype)
        padded, skips, out = x.shape[1:3], [], {}
        for level, features in enumerate(widths):
            x = two_convs(x, features, f'down{level}')
            skips.append(x)
            x = max_pool(x, 2, 0)
        x = two_convs(x, deepest, 'deepest')
        x = Dropout(self.dropout, axis_name=self.axis_name)(x, train)
        for level, features in reversed(list(enumerate(widths))):
            x = DoubleSize(features, dtype=self.dtype, name=f'up{level}')(x)
            x = jnp.concatenate([skips[level], x], axis=-1)
            x = two_convs(x, features, f'up{level}')
            if level and self.deep_supervision and (train or self.is_initializing()):
                name = f'deep{2**level}'
                deep = resize(score(x, self.num_classes, name=name), padded, align_corners=False)
                out[name] = deep[:, :H, :W]
        return {'logits': score(x, self.num_classes, name='classifier')[:, :H, :W], **out}


class BackboneUNet(nn.Module):
    """B H W C -> {'logits': B H W K, and in training 'deep2' ...: B H W K}, float32."""

    num_classes: int
    backbone: nn.Module
    width: int = 64
    center: bool = False
    deep_supervision: bool = False
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        size = image.shape[1:3]
        features = self.backbone(image.astype(self.dtype), train)

        shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
        x, out = features[32], {}
        if self.center:
            for j in (1, 2):
                x = ConvNorm(x.shape[-1], **shared, name=f'center_{j}')(x, train)
        for i, stride in enumerate((16, 8, 4, 2, 1)):
            skip = features.get(-2 * stride, features.get(stride)) if stride > 1 else None
            larger = size if skip is None else skip.shape[1:3]
            channels = 4 * self.width // 2**i
            x = UpConvNorm(channels, **shared, name=f'up{i}_1')(x, skip, larger, train)
            x = ConvNorm(channels, **shared, name=f'up{i}_2')(x, train)
            deep = self.deep_supervision and (train or self.is_initializing())
            if deep and 1 < stride < 16:
                name = f'deep{stride}'
                out[name] = resize(score(x, self.num_classes, name=name), size, align_corners=False)
        return {'logits': score(x, self.num_classes, 3, name='classifier'), **out}


class UpConvNorm(nn.Module):
    """Nearest upsampling of `x` to `size` -> concatenation with `skip`, if any -> `ConvNorm`."""

    features: int
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, skip, size, train: bool):
        _, norm = units(self, train)
        x = UpConv(self.features, self.dtype, name='conv')(x, skip, size)
        return nn.relu(norm('bn')(x))


class UpConv(nn.Module):
    """The 3x3 convolution of `UpConvNorm`, B h w I and B H W S -> B H W O."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, skip, size):
        channels = x.shape[-1] + (0 if skip is None else skip.shape[-1])
        kernel = self.param('kernel', HE_NORMAL, (3, 3, channels, self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        static = is_static((*x.shape, *size))
        if static and tuple(size) == (2 * x.shape[1], 2 * x.shape[2]):
            return checkpoint_name(conv3x3_of_doubled(x, skip, kernel), CONVOLVED)
        x = resize_nearest(x, size)
        x = x if skip is None else jnp.concatenate([x, skip], axis=-1)
        pad = ((1, 1), (1, 1))
        layout = ('NHWC', 'HWIO', 'NHWC')
        return conv_general_dilated(x, kernel, (1, 1), pad, dimension_numbers=layout)
