"""DeepLab: v1 (Chen et al. 2015, arXiv 1412.7062), v2 (2018, arXiv 1606.00915), v3 (2017,
arXiv 1706.05587) and v3+ (2018, arXiv 1802.02611).

`DeepLabV1`, LargeFOV (v1 section 3.2): VGG16 with 3x3 pools, pool4 and pool5 at stride 1,
block 5 dilated by 2; fc6 3x3 of 1024 features dilated by 12, fc7 1x1 of 1024. Its fully
connected CRF is pspnet_jax/inference/crf.py, at inference (`eval.crf`).
Deviations: the loss compares full-resolution logits, theirs every eighth label; the average pooling
after pool5 in the released network, which is not in the paper, is left out.

`DeepLabV2` (section 3.2): ASPP-L, four parallel branches dilated by 6, 12, 18, 24 whose scores are
added: on VGG16 each has an fc6, fc7, fc8, on other backbones a single 3x3. With `scales`
(section 4.1) the same network sees the image at each scale and the largest score wins; in training
each scale's scores have the auxiliary loss. BatchNorm is trained; the authors keep it frozen.

`DeepLabV3`: ASPP with BatchNorm and the image-level average (section 3.3, figure 5),
rates 6, 12, 18 at output stride 16, twice that at 8, multi-grid (1, 2, 4) in the backbone.
The variants `torchvision` and `smp` add the 3x3 after the ASPP that those networks have, unlike the
paper; torchvision resizes without align_corners. The auxiliary head, as in torchvision, is on the
features of stride 16.

`DeepLabV3Plus` (section 3.1): the ASPP's output, enlarged to stride 4 and concatenated with 48
features of that stride, passes two separable 3x3s; the ASPP's 3x3s are separable too. `smp` follows
segmentation_models_pytorch 0.6: one separable 3x3 before the upsampling, one after it, no BatchNorm
inside them, align-corners upsampling.
Deviations of both: dropout 0.5 after the ASPP, as in torchvision and smp, which the papers do not
mention.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pspnet_jax.models.fcn import FullyConnected
from pspnet_jax.models.layers import (
    ConvNorm,
    Dropout,
    Head,
    SeparableConvNorm,
    resize,
    scaled,
    score,
)


class DeepLabV1(nn.Module):
    """B H W C -> {'logits': B H W K}, float32."""

    num_classes: int
    backbone: nn.Module
    fc_features: int = 1024
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        x = self.backbone(image.astype(self.dtype), train)[32]  # B H/8 W/8 512
        shared = {'dropout': self.dropout, 'dtype': self.dtype, 'axis_name': self.axis_name}
        x = FullyConnected(self.fc_features, 3, 12, **shared, name='fully_connected')(x, train)
        x = score(x, self.num_classes, name='classifier')
        return {'logits': resize(x, image.shape[1:3], align_corners=False)}


class SummedASPP(nn.Module):
    """B h w C -> B h w K: the scores of parallel dilated branches, added (ASPP-L)."""

    num_classes: int
    rates: tuple[int, ...]
    fc_features: int  # 0: no fc6 and fc7, a single 3x3 each
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        shared = {'dropout': self.dropout, 'dtype': self.dtype, 'axis_name': self.axis_name}
        total = 0.0
        for rate in self.rates:
            if self.fc_features:
                fc = FullyConnected(self.fc_features, 3, rate, **shared, name=f'branch{rate}')
                y = fc(x, train)
                total += score(y, self.num_classes, name=f'classifier{rate}')
            else:
                total += score(x, self.num_classes, 3, dilation=rate, name=f'classifier{rate}')
        return total


class DeepLabV2(nn.Module):
    """B H W C -> {'logits': B H W K, and in training 'aux_SCALE' for each}, float32."""

    num_classes: int
    backbone: nn.Module
    rates: tuple[int, ...] = (6, 12, 18, 24)
    scales: tuple[float, ...] = (0.5, 0.75, 1.0)
    fc_features: int = 0  # of each branch; 0: a single 3x3 each
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        H, W = image.shape[1:3]
        shared = {'dropout': self.dropout, 'dtype': self.dtype, 'axis_name': self.axis_name}
        # All scales share the ASPP and the backbone.
        aspp = SummedASPP(self.num_classes, self.rates, self.fc_features, **shared, name='aspp')
        scores = {}
        for scale in self.scales:
            x = resize(image, (scaled(H, scale), scaled(W, scale)), align_corners=False)
            x = self.backbone(x.astype(self.dtype), train)[32]
            scores[scale] = resize(aspp(x, train), (H, W), align_corners=False)
        out = {'logits': jnp.stack(list(scores.values())).max(axis=0)}
        if train and len(scores) > 1:
            out |= {f'aux_{scale}': x for scale, x in scores.items()}
        return out


class ASPP(nn.Module):
    """B h w C -> B h w features: 1x1, dilated 3x3s and the image's mean, joined by a 1x1."""

    features: int
    rates: tuple[int, ...]
    separable: bool = False
    norm_between: bool = True
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
        branches = [ConvNorm(self.features, 1, **shared, name='conv1x1')(x, train)]
        for i, rate in enumerate(self.rates, start=1):
            options = {'dilation': rate, **shared, 'name': f'dilated{i}'}
            if self.separable:
                branch = SeparableConvNorm(self.features, norm_between=self.norm_between, **options)
            else:
                branch = ConvNorm(self.features, **options)
            branches.append(branch(x, train))
        mean = x.mean(axis=(1, 2), keepdims=True)
        mean = ConvNorm(self.features, 1, **shared, name='image')(mean, train)
        branches.append(jnp.broadcast_to(mean, branches[0].shape))
        x = jnp.concatenate(branches, axis=-1)
        x = ConvNorm(self.features, 1, **shared, name='project')(x, train)
        return Dropout(self.dropout, axis_name=self.axis_name)(x, train)


def _rates(rates: tuple[int, ...] | None, output_stride: int) -> tuple[int, ...]:
    """6, 12, 18 at output stride 16, twice that at 8, half at 32 (v3, section 3.3)."""
    return rates or tuple(rate * 16 // output_stride for rate in (6, 12, 18))


class DeepLabV3(nn.Module):
    """B H W C -> {'logits': B H W K, and in training 'aux': B H W K}, float32."""

    num_classes: int
    backbone: nn.Module
    width: int = 64
    rates: tuple[int, ...] | None = None
    variant: str = 'paper'
    dropout: float = 0.5
    aux_head: bool = True
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        size, align = image.shape[1:3], self.variant != 'torchvision'
        shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
        features = self.backbone(image.astype(self.dtype), train)
        rates = _rates(self.rates, self.backbone.output_stride)
        aspp = ASPP(4 * self.width, rates, dropout=self.dropout, **shared, name='aspp')
        x = aspp(features[32], train)
        if self.variant != 'paper':
            x = ConvNorm(4 * self.width, **shared, name='project')(x, train)
        x = score(x, self.num_classes, name='classifier')
        out = {'logits': resize(x, size, align_corners=align)}
        if self.aux_head and (train or self.is_initializing()):
            # torchvision drops 0.1 of single values here, independent of the main head
            drop = min(self.dropout, 0.1)
            head = Head(4 * self.width, self.num_classes, drop, False, **shared, name='aux')
            out['aux'] = resize(head(features[16], train), size, align_corners=align)
        return out


class DeepLabV3Plus(nn.Module):
    """B H W C -> {'logits': B H W K}, float32."""

    num_classes: int
    backbone: nn.Module
    width: int = 64
    rates: tuple[int, ...] | None = None
    variant: str = 'paper'
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        smp, wide = self.variant == 'smp', 4 * self.width
        shared = {'dtype': self.dtype, 'axis_name': self.axis_name}
        separable = {'norm_between': not smp, **shared}
        features = self.backbone(image.astype(self.dtype), train)
        rates = _rates(self.rates, self.backbone.output_stride)
        aspp = ASPP(wide, rates, separable=True, dropout=self.dropout, **separable, name='aspp')
        fuse1 = SeparableConvNorm(wide, **separable, name='fuse1')
        x = aspp(features[32], train)
        x = fuse1(x, train) if smp else x
        low = ConvNorm(3 * self.width // 4, 1, **shared, name='low')(features[4], train)
        x = jnp.concatenate([resize(x, low.shape[1:3]), low], axis=-1)
        x = x if smp else fuse1(x, train)
        x = SeparableConvNorm(wide, **separable, name='fuse2')(x, train)
        x = score(x, self.num_classes, name='classifier')
        return {'logits': resize(x, image.shape[1:3])}
