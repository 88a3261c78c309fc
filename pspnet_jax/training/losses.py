"""Losses: (logits B H W K, labels B H W) -> float32 scalar; two learn from a teacher's arrays.

Pixels labelled `ignore_label` count nowhere. Sums run over the whole batch; under `jax.pmap` give
`axis_name`, so that numerator and denominator are each summed over the global batch before they
are divided: the same number on 1 and on N devices. `TERMS` names those that the config sums.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Axis = str | None  # mapped by `jax.pmap`


def cross_entropy(
    logits_BHWK: Array,
    labels_BHW: Array,
    *,
    ignore_label: int = 255,
    class_weights: Sequence[float] = (),
    axis_name: Axis = None,
) -> Array:
    """Mean over counted pixels, weighted by their class (`torch.nn.CrossEntropyLoss`)."""
    log_prob_BHW, weight_BHW = _true_class(logits_BHWK, labels_BHW, ignore_label, class_weights)
    return mean(-log_prob_BHW, weight_BHW, axis_name)


def focal(
    logits_BHWK: Array,
    labels_BHW: Array,
    *,
    gamma: float,
    ignore_label: int = 255,
    class_weights: Sequence[float] = (),
    axis_name: Axis = None,
) -> Array:
    """`cross_entropy` with each pixel times (1 - p)^gamma, p the probability of its class.

    Lin et al. 2017 (arXiv 1708.02002), equation 5; their alpha is `class_weights`.
    Deviation: of a softmax, and the mean over pixels, where theirs is of sigmoids and divided
    by the number of objects. gamma 0 is `cross_entropy`.
    """
    log_prob_BHW, weight_BHW = _true_class(logits_BHWK, labels_BHW, ignore_label, class_weights)
    # log(1 - p) as what the other classes have: of p near 1 no digit is lost, and the gradient
    # of a power below 1 stays finite.
    other_BHWK = jax.nn.one_hot(labels_BHW, logits_BHWK.shape[-1]) == 0
    log_rest_BHW = jax.nn.logsumexp(
        jax.nn.log_softmax(logits_BHWK.astype(jnp.float32)), axis=-1, where=other_BHWK
    )
    total = _sum(-(weight_BHW * jnp.exp(gamma * log_rest_BHW) * log_prob_BHW).sum(), axis_name)
    return total / jnp.maximum(_sum(weight_BHW.sum(), axis_name), 1e-6)


def top_k_cross_entropy(
    logits_BHWK: Array,
    labels_BHW: Array,
    *,
    share: float,
    ignore_label: int = 255,
    class_weights: Sequence[float] = (),
    axis_name: Axis = None,
) -> Array:
    """`cross_entropy` of the `share` of the batch's counted pixels that have most of it.

    Online bootstrapping (Wu et al. 2016, arXiv 1605.06885); nnU-Net's TopKLoss, which counts
    ignored pixels too. The number of pixels is rounded, and at least one.
    """
    log_prob_BHW, weight_BHW = _true_class(logits_BHWK, labels_BHW, ignore_label, class_weights)
    counted_BHW = labels_BHW != ignore_label
    # What is ignored comes last, even after pixels that cost nothing.
    negative_BHW = jnp.where(counted_BHW, weight_BHW * log_prob_BHW, 1.0)
    negative_N, weight_N = jax.lax.sort(
        tuple(gather(x, axis_name).ravel() for x in (negative_BHW, weight_BHW)), num_keys=1
    )
    counted = _sum(counted_BHW.sum(), axis_name)
    number = jnp.minimum(jnp.maximum(jnp.round(share * counted), 1), counted)
    kept_N = jnp.arange(len(weight_N)) < number
    total = jnp.where(kept_N, -negative_N, 0.0).sum()
    return total / jnp.maximum(jnp.where(kept_N, weight_N, 0.0).sum(), 1e-6)


def soft_dice(
    logits_BHWK: Array,
    labels_BHW: Array,
    *,
    ignore_label: int = 255,
    smooth: float = 1.0,
    axis_name: Axis = None,
) -> Array:
    """1 - Dice of the probabilities, mean over the classes 1..K-1 but the one that is ignored.

    Milletari et al. 2016, with p rather than p^2 in the denominator, summed over the
    batch as one volume: a slice without tumour then pulls the probabilities down
    there, instead of being a Dice of its own that no prediction but zero can meet.
    """
    prob_BHWK, true_BHWK = _counted(logits_BHWK, labels_BHW, ignore_label)
    overlap_K = _sum((prob_BHWK * true_BHWK).sum((0, 1, 2)), axis_name)
    size_K = _sum((prob_BHWK + true_BHWK).sum((0, 1, 2)), axis_name)
    dice_K = (2.0 * overlap_K + smooth) / (size_K + smooth)
    return 1.0 - dice_K[_structures(len(dice_K), ignore_label)].mean()


def tversky(
    logits_BHWK: Array,
    labels_BHW: Array,
    *,
    alpha: float,
    beta: float,
    ignore_label: int = 255,
    smooth: float = 0.5,
    axis_name: Axis = None,
) -> Array:
    """1 - TP / (TP + alpha FP + beta FN), mean over structures and over the batch as `soft_dice`.

    Salehi et al. 2017 (arXiv 1706.05721), who have no `smooth`. A beta above alpha prefers a
    lesion outlined too widely to one that is missed; 0.5 and 0.5 are `soft_dice`.
    """
    prob_BHWK, true_BHWK = _counted(logits_BHWK, labels_BHW, ignore_label)
    hit_K, false_K, missed_K = (
        _sum(x_BHWK.sum((0, 1, 2)), axis_name)
        for x_BHWK in (
            prob_BHWK * true_BHWK, prob_BHWK * (1.0 - true_BHWK), (1.0 - prob_BHWK) * true_BHWK
        )
    )  # fmt: skip
    index_K = (hit_K + smooth) / (hit_K + alpha * false_K + beta * missed_K + smooth)
    return 1.0 - index_K[_structures(len(index_K), ignore_label)].mean()


def lovasz_softmax(
    logits_BHWK: Array, labels_BHW: Array, *, ignore_label: int = 255, axis_name: Axis = None
) -> Array:
    """The Lovasz extension of 1 - IoU, mean over the classes that the batch has.

    Berman et al. 2018 (arXiv 1705.08790), the authors' code with classes='present' and
    per_image=False: background is a class too. A class's errors |truth - p| are sorted over the
    whole batch, and each is weighted by what it adds to 1 - IoU once it is counted as wrong.
    Deviation: these weights are written out. Theirs are differences of ratios near 1, of which
    float32 keeps a digit or two at a million pixels.
    """
    prob_NK = jax.nn.softmax(logits_BHWK.astype(jnp.float32)).reshape(-1, logits_BHWK.shape[-1])
    prob_NK, labels_N = gather(prob_NK, axis_name), gather(labels_BHW.ravel(), axis_name)
    counted_N1 = (labels_N != ignore_label)[:, None]
    true_KN = ((jax.nn.one_hot(labels_N, prob_NK.shape[-1]) > 0) & counted_N1).T
    error_KN = jnp.where(true_KN, 1.0 - prob_NK.T, prob_NK.T)
    error_KN = jnp.where(counted_N1.T, error_KN, 0.0)  # ignored: last, where it changes nothing
    negative_KN, true_KN = jax.lax.sort(
        (-error_KN, true_KN.astype(jnp.int32)), dimension=1, num_keys=1
    )
    size_K1, hits_KN = true_KN.sum(1, keepdims=True), jnp.cumsum(true_KN, axis=1)
    union_KN = size_K1 + jnp.cumsum(1 - true_KN, axis=1)
    # A wrong pixel of the class takes one from the intersection, another adds one to the union.
    union_KN, left_KN = union_KN.astype(jnp.float32), (size_K1 - hits_KN).astype(jnp.float32)
    before_KN = jnp.maximum(union_KN - 1.0, 1.0)
    weight_KN = jnp.where(true_KN > 0, 1.0, left_KN / before_KN) / jnp.maximum(union_KN, 1.0)
    loss_K = -(weight_KN * negative_KN).sum(1)
    present_K = (size_K1[:, 0] > 0).astype(jnp.float32)
    return (present_K * loss_K).sum() / jnp.maximum(present_K.sum(), 1.0)


def boundary(
    logits_BHWK: Array, labels_BHW: Array, *, ignore_label: int = 255, axis_name: Axis = None
) -> Array:
    """Probability times `signed_distance`, mean over counted pixels and structures; may be < 0.

    Kervadec et al. 2019 (arXiv 1812.07032). It needs a loss of regions beside it: an image
    without the structure gives no gradient. Deviations: the maps are those of the augmented crop,
    made in the compiled step, where theirs are read with the image; the weight is constant,
    where theirs rises with the epochs.
    """
    K = logits_BHWK.shape[-1]
    structures = _structures(K, ignore_label)
    prob_BHWS = jax.nn.softmax(logits_BHWK.astype(jnp.float32))[..., structures]
    counted_BHW1 = (labels_BHW != ignore_label)[..., None]
    inside_BHWS = jax.nn.one_hot(labels_BHW, K)[..., structures] > 0
    distance_BHWS = signed_distance(inside_BHWS, ~inside_BHWS & counted_BHW1)
    total = _sum((prob_BHWS * distance_BHWS).sum(), axis_name)
    number = _sum(counted_BHW1.sum().astype(jnp.float32), axis_name) * len(structures)
    return total / jnp.maximum(number, 1e-6)


def signed_distance(inside_BHWS: Array, outside_BHWS: Array) -> Array:
    """B H W S float32, pixels: outside the distance to the nearest pixel inside; inside 1 minus
    that to the nearest one outside, 0 at the edge and negative further in.

    The authors' `one_hot2dist`, by Euclidean distances between the centres of pixels, exact. 0
    where a pixel is neither inside nor outside, and throughout an image that lacks one of both.
    """
    S = inside_BHWS.shape[-1]
    square = _squared_distance(jnp.concatenate([inside_BHWS, outside_BHWS], axis=-1))
    distance = jnp.sqrt(square)
    signed = jnp.where(outside_BHWS, distance[..., :S], 0.0)
    signed = jnp.where(inside_BHWS, 1.0 - distance[..., S:], signed)
    both_B11S = (inside_BHWS.any((1, 2)) & outside_BHWS.any((1, 2)))[:, None, None]
    return jnp.where(both_B11S, signed, 0.0)


def _squared_distance(goal_BHWC: Array) -> Array:
    """To the nearest True, in squared pixels: along columns, then of these along rows.

    The two passes of Felzenszwalb and Huttenlocher 2012. Deviation: a minimum is over all
    offsets, H W (H + W) steps without a branch, in place of their lower envelope.
    """
    far = 4.0 * max(goal_BHWC.shape[1:3]) ** 2  # further than any two pixels are apart
    x = jnp.where(goal_BHWC, 0.0, far)
    for axis in (1, 2):
        n = x.shape[axis]
        pad = [(n, n) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, pad, constant_values=far)

        def nearer(offset, best, padded=padded, axis=axis, n=n):
            left, right = (
                jax.lax.dynamic_slice_in_dim(padded, start, n, axis)
                for start in (n - offset, n + offset)
            )
            return jnp.minimum(best, jnp.minimum(left, right) + jnp.float32(offset) ** 2)

        x = jax.lax.fori_loop(1, n, nearer, x, unroll=4)  # 4 offsets in a kernel
    return x


def distillation(
    logits_BHWK: Array,
    teacher_BHWK: Array,
    labels_BHW: Array,
    *,
    loss: str = 'kl',
    temperature: float = 1.0,
    ignore_label: int = 255,
    axis_name: Axis = None,
) -> Array:
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
    return mean(gap_BHW, labels_BHW != ignore_label, axis_name)


def pairwise_affinity(
    features_BhwC: Array, teacher_BhwD: Array, *, axis_name: Axis = None
) -> Array:
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


def _cosines(x_BhwC: Array) -> Array:
    """B n n of every pair of n = h w cells."""
    x_BnC = x_BhwC.astype(jnp.float32).reshape(len(x_BhwC), -1, x_BhwC.shape[-1])
    square_Bn1 = (x_BnC**2).sum(-1, keepdims=True)
    some_Bn1 = square_Bn1 > 1e-12
    unit_BnC = x_BnC * jnp.where(some_Bn1, jax.lax.rsqrt(jnp.where(some_Bn1, square_Bn1, 1.0)), 0.0)
    return jnp.einsum('bnc,bmc->bnm', unit_BnC, unit_BnC, precision='highest')


def mean(x_BHW: Array, weight_BHW: Array, axis_name: Axis) -> Array:
    """Weighted by pixels over the whole batch; 0 where nothing has a weight."""
    weight_BHW = weight_BHW.astype(jnp.float32)
    total = _sum((weight_BHW * x_BHW).sum(), axis_name)
    return total / jnp.maximum(_sum(weight_BHW.sum(), axis_name), 1e-6)


def _counted(logits_BHWK: Array, labels_BHW: Array, ignore_label: int) -> tuple[Array, Array]:
    """B H W K each: probabilities and truth, 0 where pixels are ignored."""
    counted_BHW1 = (labels_BHW != ignore_label)[..., None].astype(jnp.float32)
    true_BHWK = jax.nn.one_hot(labels_BHW, logits_BHWK.shape[-1])
    prob_BHWK = jax.nn.softmax(logits_BHWK.astype(jnp.float32))
    return prob_BHWK * counted_BHW1, true_BHWK * counted_BHW1


def _true_class(
    logits_BHWK: Array, labels_BHW: Array, ignore_label: int, class_weights: Sequence[float]
) -> tuple[Array, Array]:
    """B H W each: log probability of the pixel's class, and the pixel's weight, 0 if ignored."""
    counted_BHW = labels_BHW != ignore_label
    labels_BHW = jnp.where(counted_BHW, labels_BHW, 0)
    log_prob_BHW = jnp.take_along_axis(
        jax.nn.log_softmax(logits_BHWK.astype(jnp.float32)), labels_BHW[..., None], axis=-1
    )[..., 0]
    weight_BHW = counted_BHW.astype(jnp.float32)
    if class_weights:
        weight_BHW *= jnp.asarray(class_weights, jnp.float32)[labels_BHW]
    return log_prob_BHW, weight_BHW


def _structures(num_classes: int, ignore_label: int) -> np.ndarray:
    """The classes but background and the one that is ignored."""
    return np.array([k for k in range(1, num_classes) if k != ignore_label])


def _sum(x: Array, axis_name: Axis) -> Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def gather(x: Array, axis_name: Axis) -> Array:
    """Of all devices, one after the other along the first axis."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


# The config's weight in the sum -> the loss, and its arguments by the knobs that they come from. An
# entry from outside, (loss, {}), has its weight in loss.extra, and may use `mean` and `gather`.
TERMS: dict[str, tuple[Callable[..., Array], dict[str, str]]] = {
    'cross_entropy': (cross_entropy, {'class_weights': 'class_weights'}),
    'dice': (soft_dice, {}),
    'focal': (focal, {'gamma': 'focal_gamma', 'class_weights': 'class_weights'}),
    'tversky': (tversky, {'alpha': 'tversky_alpha', 'beta': 'tversky_beta'}),
    'lovasz': (lovasz_softmax, {}),
    'top_k': (top_k_cross_entropy, {'share': 'top_k_share', 'class_weights': 'class_weights'}),
    'boundary': (boundary, {}),
}
