"""SegNet (Badrinarayanan, Kendall and Cipolla 2017, arXiv 1511.00561).

Section 3: VGG16's thirteen convolutions with BatchNorm, and a mirrored decoder of thirteen that
places each value where the encoder's pooling found its maximum; the thirteenth makes the scores.
The max-unpooling is exact (`layers.max_unpool`).
Deviations: the image is padded at its bottom and right edges to a multiple of 32. A backbone that
does not pool between its blocks has no indices: with ResNets and MobileNetV2 the decoder upsamples
bilinearly, a variant in the paper's section 3.3.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspnet_jax.models.layers import ConvNorm, max_unpool, pad_to_multiple, resize, score


class SegNet(nn.Module):
    """B H W C -> {'logits': B H W K}, float32."""

    num_classes: int
    backbone: nn.Module
    width: int = 64
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        H, W = image.shape[1:3]
        shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
        encoded = self.backbone(pad_to_multiple(image, 32).astype(self.dtype), train)
        x = encoded[32]
        for block, depth in ((5, 3), (4, 3), (3, 3), (2, 2), (1, 1)):
            before = encoded.get(-(2**block))
            if before is not None:
                x = max_unpool(x, before)
            else:
                x = resize(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=False)
            for i in range(depth, 0, -1):
                wide = min(2 ** (block - 1), 8)  # of this block; the last narrows to the next
                narrow = min(2 ** max(block - 2, 0), 8)
                features = self.width * (narrow if i == 1 else wide)
                x = ConvNorm(features, **shared, name=f'up{block}_{i}')(x, train)
        return {'logits': score(x, self.num_classes, 3, name='classifier')[:, :H, :W]}
