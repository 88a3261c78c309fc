"""Fully convolutional networks (Long, Shelhamer and Darrell 2015, arXiv 1411.4038).

`FCN` is FCN-32s, -16s and -8s (section 4, figure 3): VGG16's fc6 and fc7 as convolutions (4096
features; `fc_features` 512 is the light variant), and 1x1 scores from fc7, pool4 and pool3. Scores
start at zero and are added after a learned twofold upsampling that starts bilinear. The last
upsampling, by 32, 16 or 8, is fixed and bilinear.
Deviations: the image is padded at its bottom and right edges to a multiple of 32, while the authors
pad 100 pixels on all sides and crop again. The last upsampling is half-pixel interpolation, which
repeats the outermost cell at the border, while theirs fades to zero. All skips are trained at once,
not in stages. Backbones other than VGG16 have no fc6 and fc7 unless asked for: `fc_features` 0
scores the last features directly.

`DilatedFCN` is torchvision's `fcn_resnet50` and `fcn_resnet101`, which are not in the paper:
dilated to stride 8, with a 3x3 head and an auxiliary one, without skips.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspnet_jax.models.layers import (
    Dropout,
    Head,
    bilinear_upsample,
    conv,
    pad_to_multiple,
    resize,
    score,
)


class FullyConnected(nn.Module):
    """VGG16's fc6 (kernel, dilation) and fc7 (1x1) as convolutions, with ReLU and dropout."""

    features: int
    kernel: int = 7
    dilation: int = 1
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        options = {'use_bias': True, 'dtype': self.dtype}
        drop = Dropout(self.dropout, axis_name=self.axis_name)
        fc6 = conv(self.features, self.kernel, dilation=self.dilation, **options, name='fc6')
        x = drop(nn.relu(fc6(x)), train)
        return drop(nn.relu(conv(self.features, 1, **options, name='fc7')(x)), train)


class FCN(nn.Module):
    """B H W C -> {'logits': B H W K}, float32; `stride` is 32, 16 or 8."""

    num_classes: int
    backbone: nn.Module
    stride: int = 8
    fc_features: int = 0  # of fc6 and fc7; 0: neither
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        H, W = image.shape[1:3]
        x = pad_to_multiple(image, 32)
        padded = x.shape[1:3]
        features = self.backbone(x.astype(self.dtype), train)
        x = features[32]
        if self.fc_features:
            shared = {'dropout': self.dropout, 'dtype': self.dtype, 'axis_name': self.axis_name}
            x = FullyConnected(self.fc_features, **shared, name='fully_connected')(x, train)

        def scored(x, name):
            return score(x, self.num_classes, kernel_init=nn.initializers.zeros, name=name)

        x = scored(x, 'score32')
        for stride in (16, 8):
            if stride >= self.stride:
                x = bilinear_upsample(self.num_classes, 2, name=f'up{stride}')(x)
                x = x + scored(features[stride], f'score{stride}')
        return {'logits': resize(x, padded, align_corners=False)[:, :H, :W]}


class DilatedFCN(nn.Module):
    """B H W C -> {'logits': B H W K, and in training 'aux': B H W K}, float32."""

    num_classes: int
    backbone: nn.Module
    width: int = 64
    dropout: float = 0.1
    aux_head: bool = True
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        size = image.shape[1:3]
        features = self.backbone(image.astype(self.dtype), train)
        head = {
            'num_classes': self.num_classes,
            'dropout': self.dropout,
            'whole_channels': False,
            'dtype': self.dtype,
            'axis_name': self.axis_name,
        }
        x = Head(8 * self.width, **head, name='head')(features[32], train)
        out = {'logits': resize(x, size, align_corners=False)}
        if self.aux_head and (train or self.is_initializing()):
            x = Head(4 * self.width, **head, name='aux')(features[16], train)
            out['aux'] = resize(x, size, align_corners=False)
        return out
