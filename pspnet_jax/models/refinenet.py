"""RefineNet (Lin, Milan, Shen and Reid 2017, arXiv 1611.06612).

Section 3, figure 2: features of stride 32, 16, 8 and 4 each pass a RefineNet block, which also
takes the coarser block's output: two residual convolution units per path, multi-resolution fusion,
chained residual pooling of two 5x5 poolings, and an output unit. The coarsest block has 512
features, the others 256; two units, dropout and a 3x3 make the scores at stride 4.
Deviations: upsampling is bilinear with align_corners, which the paper leaves open. The units' 3x3s
have biases and no BatchNorm, as in the text; the authors' later PyTorch code drops the biases.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspnet_jax.models.layers import Dropout, conv, resize, score


class ResidualConvUnit(nn.Module):
    """x + 3x3(ReLU(3x3(ReLU(x))))."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        y = x
        for i in (1, 2):
            options = {'use_bias': True, 'dtype': self.dtype, 'name': f'conv{i}'}
            y = conv(x.shape[-1], **options)(nn.relu(y))
        return x + y


class ChainedResidualPooling(nn.Module):
    """ReLU, then a chain of 5x5 max pooling and 3x3, each link's output added."""

    links: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = y = nn.relu(x)
        for i in range(1, self.links + 1):
            y = nn.max_pool(y, (5, 5), padding=((2, 2), (2, 2)))
            y = conv(x.shape[-1], use_bias=True, dtype=self.dtype, name=f'conv{i}')(y)
            x = x + y
        return x


class RefineNetBlock(nn.Module):
    """Paths B h w C, finest first -> B h w features at the finest path's size."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, *paths):
        size, fused = paths[0].shape[1:3], []
        for i, x in enumerate(paths):
            for j in (1, 2):
                x = ResidualConvUnit(self.dtype, name=f'path{i}_unit{j}')(x)
            if len(paths) > 1:
                options = {'use_bias': True, 'dtype': self.dtype, 'name': f'fuse{i}'}
                x = resize(conv(self.features, **options)(x), size)
            fused.append(x)
        x = ChainedResidualPooling(dtype=self.dtype, name='pooling')(sum(fused))
        return ResidualConvUnit(self.dtype, name='output')(x)


class RefineNet(nn.Module):
    """B H W C -> {'logits': B H W K}, float32."""

    num_classes: int
    backbone: nn.Module
    width: int = 64
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        features = self.backbone(image.astype(self.dtype), train)
        x = None
        for block, stride in ((4, 32), (3, 16), (2, 8), (1, 4)):
            wide = 8 * self.width if block == 4 else 4 * self.width
            adapt = conv(wide, use_bias=True, dtype=self.dtype, name=f'adapt{block}')
            paths = (adapt(features[stride]),) if x is None else (adapt(features[stride]), x)
            x = RefineNetBlock(wide, self.dtype, name=f'block{block}')(*paths)
        for i in (1, 2):
            x = ResidualConvUnit(self.dtype, name=f'unit{i}')(x)
        x = Dropout(self.dropout, axis_name=self.axis_name)(x, train)
        x = score(x, self.num_classes, 3, name='classifier')
        return {'logits': resize(x, image.shape[1:3])}
