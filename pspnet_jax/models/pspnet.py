"""Pyramid Scene Parsing Network (Zhao et al. 2017, arXiv 1612.01105).

`PSPNet` follows section 3.2 and figure 3 with the details of the authors' PyTorch code: a pyramid
of adaptive averages, each with a 1x1 convolution to C/N channels, resized with align_corners and
concatenated with the features (`layers.PyramidConv` computes the result without the
concatenation); a 3x3 head; and in training an auxiliary head on layer3's output (section 3.3).
Deviations: the backbone may be VGG16 or narrower than 64 channels; the heads' 512 and 256 channels
shrink with it.

`VGGPSPNetBlog` is `vgg_pspnet` of image-segmentation-keras 0.3.0, the network of the blog post, for
comparison: VGG16 without dilation, output at a quarter of the input's size, no auxiliary head,
17,093,442 parameters and statistics for two classes and three channels. Its constants (BatchNorm
0.99 and 1e-3, half-pixel resizing) are Keras' own. Deviation: it learns the labels at the centres
of its cells (`training.update.labels_at`), as prediction enlarges them; theirs learns every fourth
pixel's label.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspnet_jax.models.layers import (
    BatchNorm,
    ConvNorm,
    Head,
    PyramidConv,
    adaptive_pools,
    conv,
    resize,
    score,
)


class PyramidPooling(nn.Module):
    """B h w C -> the features, and B n n C // N for each of the N bins.

    Resized and concatenated they have C + N * (C // N) channels. Without bins, only the features.
    """

    bins: tuple[int, ...] = (1, 2, 3, 6)
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool) -> tuple[jax.Array, ...]:
        if not self.bins:
            return (x,)
        channels = x.shape[-1] // len(self.bins)
        shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
        pooled = (
            ConvNorm(channels, 1, **shared, name=f'bin{n}')(y, train)
            for n, y in zip(self.bins, adaptive_pools(x, self.bins), strict=True)
        )
        return (x, *pooled)


class PSPNet(nn.Module):
    """B H W C -> {'logits': B H W K, and in training 'aux': B H W K}, float32."""

    num_classes: int
    backbone: nn.Module
    width: int = 64
    bins: tuple[int, ...] = (1, 2, 3, 6)
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
            'dtype': self.dtype,
            'axis_name': self.axis_name,
        }
        pyramid = PyramidPooling(self.bins, self.dtype, self.axis_name, name='pyramid')
        x = pyramid(features[32], train)
        out = {'logits': resize(Head(8 * self.width, **head, name='head')(x, train), size)}
        if self.aux_head and (train or self.is_initializing()):
            x = Head(4 * self.width, **head, name='aux')(features[16], train)
            out['aux'] = resize(x, size)
        return out


class VGGPSPNetBlog(nn.Module):
    """B H W C -> {'logits': B H/4 W/4 K}, float32 (`vgg_pspnet` as the blog ran it)."""

    num_classes: int
    backbone: nn.Module
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        def norm(x, name):
            constants = {'momentum': 0.99, 'epsilon': 1e-3, 'dtype': self.dtype}
            x = BatchNorm(**constants, axis_name=self.axis_name, name=name)(x, train)
            return nn.relu(x)

        x = self.backbone(image.astype(self.dtype), train)[32]  # B H/32 W/32 512
        _, h, w, _ = x.shape
        maps, bins = [x], (1, 2, 3, 6)
        for n, y in zip(bins, adaptive_pools(x, bins), strict=True):
            y = conv(512, 1, dtype=self.dtype, name=f'bin{n}')(y)
            maps.append(norm(y, f'bin{n}_bn'))
        x = PyramidConv(512, 1, align_corners=False, dtype=self.dtype, name='project')(maps)
        x = norm(x, 'project_bn')
        x = score(x, self.num_classes, 3, name='classifier')
        return {'logits': resize(x, (8 * h, 8 * w), align_corners=False)}  # B H/4 W/4 K
