"""Losses: (logits B H W K, labels B H W) -> float32 scalar; two learn from a teacher's arrays.

Pixels labelled IGNORE count nowhere. Sums run over the whole batch; under
`jax.pmap` give `axis_name`, so that numerator and denominator are each summed over
the global batch before they are divided: the same number on 1 and on N devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


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
    """1 - Dice of the probabilities, mean over the classes 1..K-1 but the one that is ignored.

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
    structures = np.array([k for k in range(1, len(dice_K)) if k != ignore_label])
    return 1.0 - dice_K[structures].mean()


def distillation(
    logits_BHWK: jax.Array,
    teacher_BHWK: jax.Array,
    labels_BHW: jax.Array,
    *,
    loss: str = 'kl',
    temperature: float = 1.0,
    ignore_label: int = 255,
    axis_name: str | None = None,
) -> jax.Array:
    """How far the probabilities are from the teacher's, mean over counted pixels.

    'kl': T^2 KL(teacher || student) of the softmax of logits / T; T^2 keeps the gradient's
    size at any temperature (Hinton et al. 2015, section 2). 'l1', 'l2': mean over the classes
    of the absolute or squared difference, at T = 1. The teacher gets no gradient; the labels
    only say which pixels count. Raises ValueError for another `loss`.
    """
    teacher_BHWK = jax.lax.stop_gradient(teacher_BHWK).astype(jnp.float32)
    logits_BHWK = logits_BHWK.astype(jnp.float32)
    if loss == 'kl':
        log_prob_BHWK = jax.nn.log_softmax(logits_BHWK / temperature)
        log_goal_BHWK = jax.nn.log_softmax(teacher_BHWK / temperature)
        gap_BHW = (jnp.exp(log_goal_BHWK) * (log_goal_BHWK - log_prob_BHWK)).sum(-1)
        gap_BHW *= temperature**2
    elif loss in ('l1', 'l2'):
        gap_BHWK = jax.nn.softmax(logits_BHWK) - jax.nn.softmax(teacher_BHWK)
        gap_BHW = (jnp.abs(gap_BHWK) if loss == 'l1' else gap_BHWK**2).mean(-1)
    else:
        raise ValueError(f"distill.loss {loss!r} is not one of 'kl', 'l1', 'l2'")
    counted_BHW = (labels_BHW != ignore_label).astype(jnp.float32)
    total = _sum((counted_BHW * gap_BHW).sum(), axis_name)
    return total / jnp.maximum(_sum(counted_BHW.sum(), axis_name), 1e-6)


def pairwise_affinity(
    features_BhwC: jax.Array, teacher_BhwD: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    """Mean over examples and pairs of cells of (a - a')^2; a is the cosine of two cells' features.

    The pair-wise distillation of Liu et al. 2019, "Structured Knowledge Distillation for
    Semantic Segmentation" (arXiv 1903.04197, section 3), every cell connected to every other.
    The caller has pooled both maps to the same few cells; they may differ in channels.
    Deviation: a cell of zeros has cosine 0 with all, and no gradient. The teacher gets none.
    """
    ours_Bnn = _cosines(features_BhwC)
    theirs_Bnn = _cosines(jax.lax.stop_gradient(teacher_BhwD))
    total = _sum(((ours_Bnn - theirs_Bnn) ** 2).sum(), axis_name)
    return total / _sum(jnp.float32(ours_Bnn.size), axis_name)


def _cosines(x_BhwC: jax.Array) -> jax.Array:
    """B n n of every pair of n = h w cells."""
    x_BnC = x_BhwC.astype(jnp.float32).reshape(len(x_BhwC), -1, x_BhwC.shape[-1])
    square_Bn1 = (x_BnC**2).sum(-1, keepdims=True)
    some_Bn1 = square_Bn1 > 1e-12
    unit_BnC = x_BnC * jnp.where(some_Bn1, jax.lax.rsqrt(jnp.where(some_Bn1, square_Bn1, 1.0)), 0.0)
    return jnp.einsum('bnc,bmc->bnm', unit_BnC, unit_BnC, precision='highest')


def _sum(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)
