"""Losses: (logits B H W K, labels B H W) -> float32 scalar; two also take a teacher's arrays.

Pixels labelled `ignore_label` are left out. Sums run over the whole batch. Under `jax.pmap` give
`axis_name`: numerator and denominator are then each summed over the global batch before they are
divided, so the loss is the same on 1 and on N devices. `TERMS` lists the losses of the config.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Axis = str | None  # the axis name of `jax.pmap`


def cross_entropy(
    logits_BHWK: Array,
    labels_BHW: Array,
    *,
    ignore_label: int = 255,
    class_weights: Sequence[float] = (),
    axis_name: Axis = None,
) -> Array:
    """Mean over counted pixels, weighted by class (`torch.nn.CrossEntropyLoss`)."""
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
    Deviation: they use sigmoids and divide by the number of objects; this uses a softmax and the
    mean over pixels. gamma 0 gives `cross_entropy`.
    """
    log_prob_BHW, weight_BHW = _true_class(logits_BHWK, labels_BHW, ignore_label, class_weights)
    # log(1 - p) is computed from the other classes: no digits are lost for p near 1, and the
    # gradient of a power below 1 stays finite.
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
    """`cross_entropy` over the hardest `share` of the batch's counted pixels.

    Online bootstrapping (Wu et al. 2016, arXiv 1605.06885), as nnU-Net's TopKLoss, which also
    counts ignored pixels. The number of pixels is rounded, and at least one.
    """
    log_prob_BHW, weight_BHW = _true_class(logits_BHWK, labels_BHW, ignore_label, class_weights)
    counted_BHW = labels_BHW != ignore_label
    # Ignored pixels come last, even after pixels without loss.
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
    """1 - Dice of the probabilities, mean over the classes 1..K-1 without the ignored one.

    Milletari et al. 2016, with p instead of p^2 in the denominator, summed over the batch as one
    volume. A slice without tumour then just lowers the probabilities there; with a Dice of its own
    it would score only for a prediction of exactly zero.
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
    """1 - TP / (TP + alpha FP + beta FN), over structures and the batch as in `soft_dice`.

    Salehi et al. 2017 (arXiv 1706.05721), who have no `smooth`. A beta above alpha
    prefers outlines that are too wide to missed lesions; 0.5 and 0.5 give `soft_dice`.
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
    """The Lovasz extension of 1 - IoU, mean over the classes in the batch, background included.

    Berman et al. 2018 (arXiv 1705.08790), as the authors' code with classes='present' and
    per_image=False. A class's errors |truth - p| are sorted over the whole batch, and each is
    weighted by how much it increases 1 - IoU. Deviation: these weights are computed in closed form.
    Theirs are differences of ratios near 1, which leaves float32 one or two digits at a million
    pixels.
    """
    prob_NK = jax.nn.softmax(logits_BHWK.astype(jnp.float32)).reshape(-1, logits_BHWK.shape[-1])
    prob_NK, labels_N = gather(prob_NK, axis_name), gather(labels_BHW.ravel(), axis_name)
    counted_N1 = (labels_N != ignore_label)[:, None]
    true_KN = ((jax.nn.one_hot(labels_N, prob_NK.shape[-1]) > 0) & counted_N1).T
    error_KN = jnp.where(true_KN, 1.0 - prob_NK.T, prob_NK.T)
    error_KN = jnp.where(counted_N1.T, error_KN, 0.0)  # ignored pixels come last, without effect
    negative_KN, true_KN = jax.lax.sort(
        (-error_KN, true_KN.astype(jnp.int32)), dimension=1, num_keys=1
    )
    size_K1, hits_KN = true_KN.sum(1, keepdims=True), jnp.cumsum(true_KN, axis=1)
    union_KN = size_K1 + jnp.cumsum(1 - true_KN, axis=1)
    # A missed pixel removes one from the intersection, a false one adds one to the union.
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

    Kervadec et al. 2019 (arXiv 1812.07032). Combine it with a region loss such as Dice: an image
    without the structure gives no gradient. Deviations: the distance maps are computed in the
    compiled step from the augmented crop, theirs are read with the image; the weight is constant,
    theirs rises with the epochs.
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
    """B H W S float32, in pixels: outside, the distance to the nearest inside pixel; inside, 1
    minus the distance to the nearest outside pixel, which is 0 at the edge and negative within.

    As the authors' `one_hot2dist`: exact Euclidean distances between pixel centres. 0 for a pixel
    that is neither inside nor outside, and for an image that has only one of both.
    """
    S = inside_BHWS.shape[-1]
    square = _squared_distance(jnp.concatenate([inside_BHWS, outside_BHWS], axis=-1))
    distance = jnp.sqrt(square)
    signed = jnp.where(outside_BHWS, distance[..., :S], 0.0)
    signed = jnp.where(inside_BHWS, 1.0 - distance[..., S:], signed)
    both_B11S = (inside_BHWS.any((1, 2)) & outside_BHWS.any((1, 2)))[:, None, None]
    return jnp.where(both_B11S, signed, 0.0)


def _squared_distance(goal_BHWC: Array) -> Array:
    """Squared distance to the nearest True, in pixels: first along columns, then along rows.

    The two passes of Felzenszwalb and Huttenlocher 2012. Deviation: the minimum over all offsets,
    H W (H + W) steps without a branch, replaces their lower envelope.
    """
    far = 4.0 * max(goal_BHWC.shape[1:3]) ** 2  # larger than any distance between two pixels
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

        x = jax.lax.fori_loop(1, n, nearer, x, unroll=4)  # 4 offsets per kernel
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
    """Distance of the probabilities from the teacher's, mean over counted pixels.

    'kl': T^2 KL(teacher || student) of the softmax of logits / T; T^2 keeps the gradient's
    size at any temperature (Hinton et al. 2015, section 2). 'l1', 'l2': mean over the classes
    of the absolute or squared difference, at T = 1. The teacher gets no gradient; the labels
    only mark the ignored pixels. Raises ValueError for another `loss`.
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
    Semantic Segmentation" (arXiv 1903.04197, section 3), with all pairs of cells. Both maps must be
    pooled to the same few cells; their channels may differ. Deviation: a cell of zeros has cosine 0
    with all cells, and no gradient. The teacher gets no gradient.
    """
    ours_Bnn = _cosines(features_BhwC)
    theirs_Bnn = _cosines(jax.lax.stop_gradient(teacher_BhwD))
    total = _sum(((ours_Bnn - theirs_Bnn) ** 2).sum(), axis_name)
    return total / _sum(jnp.float32(ours_Bnn.size), axis_name)


def _cosines(x_BhwC: Array) -> Array:
    """B n n cosines of all pairs of the n = h w cells."""
    x_BnC = x_BhwC.astype(jnp.float32).reshape(len(x_BhwC), -1, x_BhwC.shape[-1])
    square_Bn1 = (x_BnC**2).sum(-1, keepdims=True)
    some_Bn1 = square_Bn1 > 1e-12
    unit_BnC = x_BnC * jnp.where(some_Bn1, jax.lax.rsqrt(jnp.where(some_Bn1, square_Bn1, 1.0)), 0.0)
    return jnp.einsum('bnc,bmc->bnm', unit_BnC, unit_BnC, precision='highest')


def mean(x_BHW: Array, weight_BHW: Array, axis_name: Axis) -> Array:
    """The weighted mean over the pixels of the whole batch; 0 if all weights are 0."""
    weight_BHW = weight_BHW.astype(jnp.float32)
    total = _sum((weight_BHW * x_BHW).sum(), axis_name)
    return total / jnp.maximum(_sum(weight_BHW.sum(), axis_name), 1e-6)


def _counted(logits_BHWK: Array, labels_BHW: Array, ignore_label: int) -> tuple[Array, Array]:
    """B H W K each: probabilities and one-hot truth, 0 at ignored pixels."""
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
    """The classes without background and the ignored one."""
    return np.array([k for k in range(1, num_classes) if k != ignore_label])


def _sum(x: Array, axis_name: Axis) -> Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def gather(x: Array, axis_name: Axis) -> Array:
    """Concatenate `x` of all devices along the first axis."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


# {key of the weight in config.loss: (loss, {argument: key of config.loss})}. Your own entry,
# (loss, {}), has its weight in loss.extra and may use `mean` and `gather`.
TERMS: dict[str, tuple[Callable[..., Array], dict[str, str]]] = {
    'cross_entropy': (cross_entropy, {'class_weights': 'class_weights'}),
    'dice': (soft_dice, {}),
    'focal': (focal, {'gamma': 'focal_gamma', 'class_weights': 'class_weights'}),
    'tversky': (tversky, {'alpha': 'tversky_alpha', 'beta': 'tversky_beta'}),
    'lovasz': (lovasz_softmax, {}),
    'top_k': (top_k_cross_entropy, {'share': 'top_k_share', 'class_weights': 'class_weights'}),
    'boundary': (boundary, {}),
}
