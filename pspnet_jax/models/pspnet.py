"""Pyramid Scene Parsing Network (Zhao et al. 2017, arXiv 1612.01105).

`PSPNet` follows section 3.2 and figure 3 with the details of the authors' PyTorch
code: pyramid of adaptive averages, each through a 1x1 convolution to C/N channels,
resized with align_corners and concatenated behind the features; a 3x3 head; an
auxiliary head on layer3's output (section 3.3) in training only.
Deviations: the backbone may be VGG16 or narrower than 64 channels, and then the
heads' 512 and 256 channels shrink in proportion.

`VGGPSPNetBlog` is `vgg_pspnet` of image-segmentation-keras 0.3.0, the network of
the blog post, kept for comparison: VGG16 without dilation, output at a quarter of
the input's size, no auxiliary head, 17,093,442 parameters and statistics for two
classes and three channels. Its constants (BatchNorm 0.99 and 1e-3, half-pixel
resizing) are Keras' own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspnet_jax.models import backbones
from pspnet_jax.models.layers import ConvNorm, Dropout2d, adaptive_pool, conv, resize


class PyramidPooling(nn.Module):
    """B h w C -> B h w (C + N * (C // N)) for N bins; 2C when N divides C."""

    bins: tuple[int, ...] = (1, 2, 3, 6)
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        _, h, w, channels = x.shape
        branches = [x]
        for bins in self.bins:
            y = adaptive_pool(x, bins)
            y = ConvNorm(
                channels // len(self.bins), 1, self.dtype, self.axis_name, name=f'bin{bins}'
            )(y, train)
            branches.append(resize(y, (h, w)))
        return jnp.concatenate(branches, axis=-1)


class Head(nn.Module):
    """3x3 ConvNorm -> Dropout2d -> 1x1 to K classes; logits are float32."""

    features: int
    num_classes: int
    dropout: float
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        x = ConvNorm(self.features, 3, self.dtype, self.axis_name, name='project')(x, train)
        x = Dropout2d(self.dropout, self.axis_name)(x, train)
        classifier = conv(self.num_classes, 1, use_bias=True, dtype=jnp.float32, name='classifier')
        return classifier(x.astype(jnp.float32))


class PSPNet(nn.Module):
    """B H W C -> {'logits': B H W K, and in training 'aux': B H W K}, float32."""

    num_classes: int
    backbone: str = 'resnet50'
    output_stride: int = 8
    deep_stem: bool = False
    dilate_first_block: bool = True
    width: int = 64
    bins: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    aux_head: bool = True
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        size = image.shape[1:3]
        features = backbones.create(
            self.backbone,
            output_stride=self.output_stride,
            width=self.width,
            deep_stem=self.deep_stem,
            dilate_first_block=self.dilate_first_block,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )(image.astype(self.dtype), train)
        shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
        x = PyramidPooling(self.bins, **shared, name='pyramid')(features[32], train)
        x = Head(8 * self.width, self.num_classes, self.dropout, **shared, name='head')(x, train)
        out = {'logits': resize(x, size)}
        if self.aux_head and (train or self.is_initializing()):
            aux = Head(4 * self.width, self.num_classes, self.dropout, **shared, name='aux')
            out['aux'] = resize(aux(features[16], train), size)
        return out


class VGGPSPNetBlog(nn.Module):
    """B H W C -> {'logits': B H/4 W/4 K}, float32 (`vgg_pspnet` as the blog ran it)."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        def conv_norm(features, name, x):
            x = conv(features, 1, dtype=self.dtype, name=name)(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.99,
                epsilon=1e-3,
                dtype=self.dtype,
                axis_name=self.axis_name,
                name=f'{name}_bn',
            )(x)
            return nn.relu(x)

        backbone = backbones.create('vgg16', output_stride=32, dtype=self.dtype)
        x = backbone(image.astype(self.dtype), train)[32]  # B H/32 W/32 512
        _, h, w, _ = x.shape
        branches = [x]
        for bins in (1, 2, 3, 6):
            y = conv_norm(512, f'bin{bins}', adaptive_pool(x, bins))
            branches.append(resize(y, (h, w), align_corners=False))
        x = conv_norm(512, 'project', jnp.concatenate(branches, axis=-1))
        x = conv(self.num_classes, 3, use_bias=True, name='classifier')(x.astype(jnp.float32))
        return {'logits': resize(x, (8 * h, 8 * w), align_corners=False)}  # B H/4 W/4 K
