"""Losses: (logits B H W K, labels B H W) -> float32 scalar.

Pixels labelled IGNORE count nowhere. Sums run over the whole batch; under
`jax.pmap` give `axis_name`, so that numerator and denominator are each summed over
the global batch before they are divided: the same number on 1 and on N devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def cross_entropy(
    logits_BHWK: jax.Array,
    labels_BHW: jax.Array,
    *,
    ignore_label: int = 255,
    class_weights: Sequence[float] = (),
    axis_name: str | None = None,
) -> jax.Array:
    """Mean over counted pixels, weighted by their class (`torch.nn.CrossEntropyLoss`)."""
    logits_BHWK = logits_BHWK.astype(jnp.float32)
    counted_BHW = labels_BHW != ignore_label
    labels_BHW = jnp.where(counted_BHW, labels_BHW, 0)
    log_prob_BHW = jnp.take_along_axis(
        jax.nn.log_softmax(logits_BHWK), labels_BHW[..., None], axis=-1
    )[..., 0]
    weight_BHW = counted_BHW.astype(jnp.float32)
    if class_weights:
        weight_BHW *= jnp.asarray(class_weights, jnp.float32)[labels_BHW]
    total = _sum(-(weight_BHW * log_prob_BHW).sum(), axis_name)
    return total / jnp.maximum(_sum(weight_BHW.sum(), axis_name), 1e-6)


def soft_dice(
    logits_BHWK: jax.Array,
    labels_BHW: jax.Array,
    *,
    ignore_label: int = 255,
    smooth: float = 1.0,
    axis_name: str | None = None,
) -> jax.Array:
    """1 - Dice of the probabilities, mean over the classes 1..K-1 (background left out).

    Milletari et al. 2016, with p rather than p^2 in the denominator, summed over the
    batch as one volume: a slice without tumour then pulls the probabilities down
    there, instead of being a Dice of its own that no prediction but zero can meet.
    """
    prob_BHWK = jax.nn.softmax(logits_BHWK.astype(jnp.float32))
    counted_BHW1 = (labels_BHW != ignore_label)[..., None].astype(jnp.float32)
    true_BHWK = jax.nn.one_hot(labels_BHW, logits_BHWK.shape[-1]) * counted_BHW1
    prob_BHWK = prob_BHWK * counted_BHW1
    overlap_K = _sum((prob_BHWK * true_BHWK).sum((0, 1, 2)), axis_name)
    size_K = _sum((prob_BHWK + true_BHWK).sum((0, 1, 2)), axis_name)
    dice_K = (2.0 * overlap_K + smooth) / (size_K + smooth)
    return 1.0 - dice_K[1:].mean()


def _sum(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)
