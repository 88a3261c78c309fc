"""Dilated convolutions (Yu and Koltun 2016, arXiv 1511.07122).

The front end (section 4) is VGG16 without pool4 and pool5, with block 5 dilated by 2 and fc6 by 4.
Its K scores go into the context module (section 3, table 1): 3x3s dilated by 1, 1, 2, 4, 8, 16 and
1, then a 1x1, with K features each (`basic`) or 2K, 2K, 4K, 8K, 16K, 32K, 32K and K (`large`). The
module starts as the identity (equations 4 and 5), so untrained it does not change positive scores.
Deviations: convolutions are padded with zeros, while the authors pad the image by reflection and
lose the border layer by layer. The backbone may be another dilated one; its last features are then
scored without fc6 and fc7.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pspnet_jax.models.fcn import FullyConnected
from pspnet_jax.models.layers import conv, resize, score

DILATIONS = (1, 1, 2, 4, 8, 16, 1)
WIDTHS = {
    'basic': (1, 1, 1, 1, 1, 1, 1, 1),
    'large': (2, 2, 4, 8, 16, 32, 32, 1),
}


def identity_kernel(classes: int, noise: float = 0.0):
    """Initialiser of (k, k, I, O): the centre passes each class's features on.

    Equation 5: feature a of c belongs to class floor(a K / c). Between features of one class the
    centre's weight is K / O, so that the whole module is the identity; other weights are Gaussian
    with deviation `noise` times that weight. Equation 4 is the case I = O = K without noise.
    """

    def initialise(key, shape, dtype=jnp.float32):
        rows, columns, features_in, features_out = shape
        class_in = np.arange(features_in) * classes // features_in
        class_out = np.arange(features_out) * classes // features_out
        weight = classes / features_out
        kernel = noise * weight * jax.random.normal(key, shape, dtype)
        centre = jnp.asarray(weight * (class_in[:, None] == class_out), dtype)
        return kernel.at[rows // 2, columns // 2].add(centre)

    return initialise


class Context(nn.Module):
    """B h w K -> B h w K: seven dilated 3x3s and a 1x1, with a receptive field of 67 x 67 cells."""

    size: str = 'basic'
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        classes = x.shape[-1]
        noise = 0.0 if self.size == 'basic' else 0.01
        options = {'use_bias': True, 'kernel_init': identity_kernel(classes, noise)}
        *widths, last = WIDTHS[self.size]
        for i, (width, dilation) in enumerate(zip(widths, DILATIONS, strict=True), start=1):
            x = conv(
                width * classes, dilation=dilation, dtype=self.dtype, **options, name=f'conv{i}'
            )(x)
            x = nn.relu(x)
        return conv(last * classes, 1, **options, name='conv8')(x.astype(jnp.float32))


class DilatedNet(nn.Module):
    """B H W C -> {'logits': B H W K}, float32; `context` is 'basic', 'large' or 'none'."""

    num_classes: int
    backbone: nn.Module
    context: str = 'basic'
    fc_features: int = 0  # of fc6 and fc7; 0: neither
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        x = self.backbone(image.astype(self.dtype), train)[32]
        if self.fc_features:
            shared = {'dropout': self.dropout, 'dtype': self.dtype, 'axis_name': self.axis_name}
            fc = FullyConnected(self.fc_features, dilation=4, **shared, name='fully_connected')
            x = fc(x, train)
        x = score(x, self.num_classes, name='classifier')
        if self.context != 'none':
            x = Context(self.context, self.dtype, name='context')(x)
        return {'logits': resize(x, image.shape[1:3], align_corners=False)}
