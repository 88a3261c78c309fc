"""Losses against PyTorch's and against sums done by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from pspnet_jax.config import base
from pspnet_jax.training import losses, update

IGNORE = 255


def example(rng, classes=3):
    logits = rng.standard_normal((2, 5, 4, classes)).astype(np.float32)
    labels = rng.integers(0, classes, (2, 5, 4))
    labels[0, :2] = IGNORE
    return logits, labels


@pytest.mark.parametrize('weights', [(), (0.2, 1.0, 3.0)])
def test_cross_entropy_and_its_gradient_equal_pytorchs(rng, weights):
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    logits, labels = example(rng)
    theirs = torch.from_numpy(logits.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        theirs,
        torch.from_numpy(labels),
        weight=torch.tensor(weights) if weights else None,
        ignore_index=IGNORE,
    )
    expected.backward()
    loss, grad = jax.value_and_grad(
        lambda x: losses.cross_entropy(x, jnp.asarray(labels), class_weights=weights)
    )(jnp.asarray(logits))
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(
        np.asarray(grad).transpose(0, 3, 1, 2), theirs.grad.numpy(), atol=1e-6
    )


def test_cross_entropy_of_even_logits_is_log_k():
    loss = losses.cross_entropy(jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 2), jnp.int32))
    assert float(loss) == pytest.approx(np.log(4))


def test_soft_dice_by_hand(rng):
    logits, labels = example(rng)
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = []
    for k in (1, 2):
        overlap = size = 0.0
        for index in np.ndindex(labels.shape):
            if labels[index] != IGNORE:
                overlap += prob[(*index, k)] * (labels[index] == k)
                size += prob[(*index, k)] + (labels[index] == k)
        expected.append(1 - (2 * overlap + 1) / (size + 1))
    ours = losses.soft_dice(jnp.asarray(logits), jnp.asarray(labels))
    assert float(ours) == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_certain_right_answer_costs_nothing(rng):
    _, labels = example(rng)
    labels = jnp.asarray(labels)
    right = 100.0 * jax.nn.one_hot(labels, 3)
    assert float(losses.cross_entropy(right, labels)) == pytest.approx(0, abs=1e-6)
    assert float(losses.soft_dice(right, labels)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('loss', [losses.cross_entropy, losses.soft_dice])
def test_ignored_pixels_have_no_gradient(rng, loss):
    logits, labels = example(rng)
    grad = jax.grad(loss)(jnp.asarray(logits), jnp.asarray(labels))
    assert (np.asarray(grad)[labels == IGNORE] == 0).all()
    assert (np.abs(np.asarray(grad)[labels != IGNORE]) > 0).any()


@pytest.mark.parametrize('loss', [losses.cross_entropy, losses.soft_dice])
def test_nothing_to_count_is_finite(loss):
    labels = jnp.full((1, 3, 3), IGNORE)
    value, grad = jax.value_and_grad(loss)(jnp.ones((1, 3, 3, 2)), labels)
    assert jnp.isfinite(value)
    assert (grad == 0).all()


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_distillation_by_kl_and_its_gradient_equal_pytorchs(rng, temperature):
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    logits, labels = example(rng)
    teacher, _ = example(rng)
    theirs = torch.from_numpy(logits).requires_grad_()
    counted = torch.from_numpy(labels != IGNORE)
    expected = temperature**2 * torch.nn.functional.kl_div(
        torch.log_softmax(theirs / temperature, -1)[counted],
        torch.softmax(torch.from_numpy(teacher) / temperature, -1)[counted],
        reduction='batchmean',
    )
    expected.backward()
    loss, grad = jax.value_and_grad(losses.distillation)(
        jnp.asarray(logits), jnp.asarray(teacher), jnp.asarray(labels), temperature=temperature
    )
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize(('kind', 'power'), [('l1', 1), ('l2', 2)])
def test_distillation_by_differences_of_probabilities(rng, kind, power):
    logits, labels = example(rng)
    teacher, _ = example(rng)
    gap = np.abs(softmax(logits) - softmax(teacher))[labels != IGNORE] ** power
    ours = losses.distillation(logits, teacher, labels, loss=kind)
    assert float(ours) == pytest.approx(gap.mean(), rel=1e-5)
    with pytest.raises(ValueError, match="'l3' is not one of 'kl', 'l1', 'l2'"):
        losses.distillation(logits, teacher, labels, loss='l3')


def test_pairwise_affinity_pair_by_pair(rng):
    """Two networks of 5 and 3 channels; one cell is all zeros."""
    ours = rng.standard_normal((2, 3, 2, 5)).astype(np.float32)
    theirs = rng.standard_normal((2, 3, 2, 3)).astype(np.float32)
    ours[0, 1, 1] = 0

    def affinity(x, one, other):
        length = np.linalg.norm(x[one]) * np.linalg.norm(x[other])
        return x[one] @ x[other] / length if length else 0.0

    gaps = [
        (affinity(ours[b], one, other) - affinity(theirs[b], one, other)) ** 2
        for b in range(2)
        for one in np.ndindex(3, 2)
        for other in np.ndindex(3, 2)
    ]
    loss, grad = jax.value_and_grad(losses.pairwise_affinity)(
        jnp.asarray(ours), jnp.asarray(theirs)
    )
    assert float(loss) == pytest.approx(np.mean(gaps), rel=1e-5)
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[0, 1, 1] == 0).all()
    scaled = losses.pairwise_affinity(jnp.asarray(7.0 * ours), jnp.asarray(theirs))
    assert float(scaled) == pytest.approx(float(loss), rel=1e-5)


DISTILLED = [
    lambda x, y, labels, loss=loss: losses.distillation(x, y, labels, loss=loss, temperature=2.0)
    for loss in ('kl', 'l1', 'l2')
]
DISTILLED.append(lambda x, y, labels: losses.pairwise_affinity(x, y))


@pytest.mark.parametrize('loss', DISTILLED, ids=['kl', 'l1', 'l2', 'pairwise'])
def test_a_teacher_is_met_by_itself_and_learns_nothing(rng, loss):
    logits, labels = example(rng)
    teacher, _ = example(rng)
    assert float(loss(jnp.asarray(teacher), jnp.asarray(teacher), labels)) == 0
    ours, theirs = jax.grad(loss, argnums=(0, 1))(jnp.asarray(logits), jnp.asarray(teacher), labels)
    assert (np.asarray(theirs) == 0).all()
    assert (np.asarray(ours) != 0).any()


@pytest.mark.parametrize('loss', DISTILLED[:3], ids=['kl', 'l1', 'l2'])
def test_what_a_teacher_says_of_ignored_pixels_does_not_count(rng, loss):
    logits, labels = example(rng)
    teacher, _ = example(rng)
    changed = np.where((labels == IGNORE)[..., None], 100.0, teacher)
    assert float(loss(logits, teacher, labels)) == float(loss(logits, changed, labels))
    nothing = jnp.full(labels.shape, IGNORE)
    assert float(loss(jnp.asarray(logits), jnp.asarray(teacher), nothing)) == 0


# Each loss of the config's sum, with knobs under which none is another.
KNOBS = {
    'class_weights': (),
    'focal_gamma': 2.0,
    'tversky_alpha': 0.3,
    'tversky_beta': 0.7,
    'top_k_share': 0.25,
}
TERMS = {
    name: functools.partial(loss, **{argument: KNOBS[knob] for argument, knob in own.items()})
    for name, (loss, own) in losses.TERMS.items()
}


@pytest.mark.parametrize('name', TERMS)
def test_no_term_sees_ignored_pixels(rng, name):
    """Whatever their logits and, where a class is ignored, whichever class it is."""
    logits, labels = example(rng)
    changed = np.where((labels == IGNORE)[..., None], 7.0, logits)
    value, grad = jax.value_and_grad(TERMS[name])(jnp.asarray(logits), jnp.asarray(labels))
    assert float(value) == float(TERMS[name](jnp.asarray(changed), jnp.asarray(labels)))
    assert (np.asarray(grad)[labels == IGNORE] == 0).all()
    assert (np.abs(np.asarray(grad)[labels != IGNORE]) > 0).any()
    for ignored in range(3):
        counted = np.where(labels == IGNORE, ignored, labels)
        value, grad = jax.value_and_grad(TERMS[name])(
            jnp.asarray(logits), jnp.asarray(counted), ignore_label=ignored
        )
        assert np.isfinite(value)
        assert (np.asarray(grad)[counted == ignored] == 0).all()


@pytest.mark.parametrize('name', [*TERMS, 'as configured'])
def test_a_picture_padded_by_hand_has_the_same_loss(rng, name):
    """Whatever the network makes of the padding: so a letterbox changes no loss."""
    options = base.get_config().loss.to_dict()
    if name != 'as configured':
        options |= {term: float(term == name) for term in TERMS}
    logits = rng.normal(0, 2, (2, 9, 13, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (2, 9, 13)).astype(np.int32)
    around = ((0, 0), (3, 4), (2, 1))
    wide = rng.normal(0, 2, (2, 16, 16, 3)).astype(np.float32)
    wide[:, 3:12, 2:15] = logits
    filled = np.pad(labels, around, constant_values=options['ignore_label'])
    one, other = (
        update.segmentation_loss(
            {'logits': jnp.asarray(x)}, jnp.asarray(y), axis_name=None, **options
        )
        for x, y in ((logits, labels), (wide, filled))
    )
    assert float(one) > 0.01
    np.testing.assert_allclose(other, one, rtol=2e-6)


@pytest.mark.parametrize('name', TERMS)
def test_a_term_of_nothing_is_0(name):
    labels = jnp.full((1, 3, 3), IGNORE)
    value, grad = jax.value_and_grad(TERMS[name])(jnp.ones((1, 3, 3, 2)), labels)
    assert value == 0
    assert (grad == 0).all()


def test_each_term_has_its_own_knobs(rng):
    logits, labels = (jnp.asarray(x) for x in example(rng))
    knobs = {**KNOBS, 'class_weights': (0.2, 1.0, 3.0)}
    weights = {'class_weights': (0.2, 1.0, 3.0)}
    expected = {
        'cross_entropy': losses.cross_entropy(logits, labels, **weights),
        'dice': losses.soft_dice(logits, labels),
        'focal': losses.focal(logits, labels, gamma=2.0, **weights),
        'tversky': losses.tversky(logits, labels, alpha=0.3, beta=0.7),
        'lovasz': losses.lovasz_softmax(logits, labels),
        'top_k': losses.top_k_cross_entropy(logits, labels, share=0.25, **weights),
        'boundary': losses.boundary(logits, labels),
    }
    found = {
        name: loss(logits, labels, **{argument: knobs[knob] for argument, knob in own.items()})
        for name, (loss, own) in losses.TERMS.items()
    }
    assert found == expected


@pytest.mark.parametrize('name', TERMS)
def test_gradients_of_sure_answers_and_absent_classes_are_finite(rng, name):
    """Right and wrong with probability 1, in images without class 1 or of class 2 alone."""
    labels = rng.integers(0, 3, (3, 6, 5))
    labels[0][labels[0] == 1], labels[1] = 0, 2
    said = np.where(rng.random(labels.shape) < 0.5, labels, rng.integers(0, 3, labels.shape))
    both = jax.value_and_grad(TERMS[name])
    for scale, row in itertools.product((1e2, 1e30), range(3)):
        logits = scale * jax.nn.one_hot(said[row : row + 1], 3)
        value, grad = both(logits, jnp.asarray(labels[row : row + 1]))
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize('gamma', [0.25, 0.5, 2.0])
def test_the_focal_gradient_is_finite_where_the_answer_is_sure(gamma):
    """Of (1 - p)^gamma below power 1 it is infinite at p = 1, and 0 times that no number."""
    logits = jnp.array([[[[0.0, 40.0], [40.0, 0.0], [0.0, 1000.0]]]])
    labels = jnp.ones((1, 1, 3), jnp.int32)
    value, grad = jax.value_and_grad(losses.focal)(logits, labels, gamma=gamma)
    assert float(value) == pytest.approx(40 / 3, rel=1e-6)
    np.testing.assert_allclose(grad[0, 0], [[0, 0], [1 / 3, -1 / 3], [0, 0]], atol=1e-3)


@pytest.mark.parametrize('name', TERMS)
def test_a_term_is_of_the_global_batch(rng, name):
    """Two images on each of two devices, one of them with little that counts: as four on one."""
    features = jnp.asarray(rng.standard_normal((4, 5, 4, 2)), jnp.float32)
    labels = rng.integers(0, 3, (4, 5, 4))
    labels[:2, 1:] = IGNORE
    weight = jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)

    def loss(weight, features, labels, **options):
        return TERMS[name](features @ weight, labels, **options)

    expected = jax.value_and_grad(loss)(weight, features, jnp.asarray(labels))

    def on_one(features, labels):
        value, grad = jax.value_and_grad(loss)(weight, features, labels, axis_name='data')
        return value, jax.lax.pmean(grad, 'data')

    halves = features.reshape(2, 2, 5, 4, 2), jnp.asarray(labels).reshape(2, 2, 5, 4)
    found = jax.vmap(on_one, axis_name='data')(*halves)
    for ours, theirs in zip(found, expected, strict=True):
        for half in ours:
            np.testing.assert_allclose(half, theirs, rtol=1e-5, atol=1e-6)


def of_monai(logits, labels, make, **options):
    """The value and gradient, B H W K, of a loss of MONAI's over pixels that all count."""
    torch = pytest.importorskip('torch', reason='MONAI needs PyTorch')
    reason = 'the reference: pip install monai==1.6.1'
    monai = pytest.importorskip('monai.losses', reason=reason)
    theirs = torch.from_numpy(logits.transpose(0, 3, 1, 2).copy()).requires_grad_()
    loss = getattr(monai, make)(to_onehot_y=True, **options)
    value = loss(theirs, torch.from_numpy(labels)[:, None])
    value.backward()
    return value.item(), theirs.grad.numpy().transpose(0, 2, 3, 1)


def all_counted(rng, classes=3):
    return (
        rng.standard_normal((2, 7, 6, classes)).astype(np.float32),
        rng.integers(0, classes, (2, 7, 6)),
    )


@pytest.mark.parametrize('gamma', [0.5, 2.0])
def test_focal_and_its_gradient_are_monais(rng, gamma):
    logits, labels = all_counted(rng)
    options = {'use_softmax': True, 'gamma': gamma, 'reduction': 'mean'}
    value, grad = of_monai(logits, labels, 'FocalLoss', **options)
    ours, ours_grad = jax.value_and_grad(losses.focal)(logits, jnp.asarray(labels), gamma=gamma)
    assert float(ours) == pytest.approx(3 * value, rel=1e-5)  # theirs is a mean over classes too
    np.testing.assert_allclose(ours_grad, 3 * grad, atol=1e-6)


@pytest.mark.parametrize('weights', [(), (0.2, 1.0, 3.0)])
def test_focal_pixel_by_pixel_and_with_gamma_0_the_cross_entropy(rng, weights):
    logits, labels = example(rng)
    prob, total, number = softmax(logits), 0.0, 0.0
    for index in zip(*np.nonzero(labels != IGNORE), strict=True):
        p, weight = prob[index][labels[index]], weights[labels[index]] if weights else 1.0
        total -= weight * (1 - p) ** 3 * np.log(p)
        number += weight
    labels = jnp.asarray(labels)
    ours = losses.focal(logits, labels, gamma=3.0, class_weights=weights)
    assert float(ours) == pytest.approx(total / number, rel=1e-5)
    plain = losses.cross_entropy(logits, labels, class_weights=weights)
    none = losses.focal(logits, labels, gamma=0.0, class_weights=weights)
    assert float(none) == pytest.approx(float(plain), rel=1e-6)


def test_tversky_and_its_gradient_are_monais(rng):
    logits, labels = all_counted(rng)
    knobs = {'alpha': 0.2, 'beta': 0.9}
    options = {'include_background': False, 'softmax': True, 'batch': True, **knobs}
    value, grad = of_monai(logits, labels, 'TverskyLoss', smooth_nr=0.5, smooth_dr=0.5, **options)
    ours, ours_grad = jax.value_and_grad(losses.tversky)(logits, jnp.asarray(labels), **knobs)
    assert float(ours) == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(ours_grad, grad, atol=1e-6)


def test_tversky_by_hand_and_with_halves_soft_dice(rng):
    logits, labels = example(rng)
    prob, index = softmax(logits)[labels != IGNORE], []
    for k in (1, 2):
        p, true = prob[:, k], labels[labels != IGNORE] == k
        hit, false, missed = p[true].sum(), p[~true].sum(), (1 - p[true]).sum()
        index.append((hit + 0.5) / (hit + 0.3 * false + 0.7 * missed + 0.5))
    labels = jnp.asarray(labels)
    ours = losses.tversky(logits, labels, alpha=0.3, beta=0.7)
    assert float(ours) == pytest.approx(1 - np.mean(index), rel=1e-5)
    halves = losses.tversky(logits, labels, alpha=0.5, beta=0.5)
    assert float(halves) == pytest.approx(float(losses.soft_dice(logits, labels)), rel=1e-6)


@pytest.mark.parametrize(('structures', 'ignored'), [((1, 3), 2), ((1,), 2)])
def test_a_class_that_is_ignored_is_no_structure(rng, structures, ignored):
    """Of Tversky and boundary: the mean is over the others."""
    logits, labels = all_counted(rng, classes=len(structures) + 2)
    counted, prob = labels != ignored, softmax(logits)
    index, cost = [], []
    for k in structures:
        true = labels == k
        p = prob[..., k]
        hit = p[true].sum()
        index.append((hit + 0.5) / (hit + p[~true & counted].sum() + (1 - p[true]).sum() + 0.5))
        distance = losses.signed_distance(true[..., None], (~true & counted)[..., None])
        cost.append((p * distance[..., 0])[counted].mean())
    options = {'ignore_label': ignored}
    ours = losses.tversky(logits, jnp.asarray(labels), alpha=1.0, beta=1.0, **options)
    assert float(ours) == pytest.approx(1 - np.mean(index), rel=1e-5)
    ours = losses.boundary(jnp.asarray(logits), jnp.asarray(labels), **options)
    assert float(ours) == pytest.approx(np.mean(cost), rel=1e-4)


def lovasz_weights(error_N, true_N):
    """(N,) float64: by how much each error adds to 1 - IoU (Berman et al. 2018, algorithm 1)."""
    order = np.argsort(-error_N, kind='stable')
    hits, weights = true_N[order].astype(float), np.zeros(len(order))
    jaccard = 1 - (hits.sum() - hits.cumsum()) / (hits.sum() + (1 - hits).cumsum())
    weights[order] = np.diff(jaccard, prepend=0.0)
    return weights


def lovasz_of(prob_NK, labels_N):
    """The mean over the classes that are present, and its gradient by the probabilities."""
    present, total, grad_NK = np.unique(labels_N), 0.0, np.zeros_like(prob_NK)
    for k in present:
        true_N = labels_N == k
        error_N = np.abs(true_N - prob_NK[:, k])
        weights_N = lovasz_weights(error_N, true_N) / len(present)
        total += error_N @ weights_N
        grad_NK[:, k] = np.where(true_N, -weights_N, weights_N)
    return total, grad_NK


@pytest.mark.parametrize('present', [(0, 1, 2), (0, 2), (1,)])
def test_lovasz_softmax_and_its_gradient_by_the_authors_algorithm(rng, present):
    logits, labels = example(rng)
    labels = np.where(labels == IGNORE, IGNORE, np.array(present)[labels % len(present)])
    counted, prob = labels != IGNORE, softmax(logits.astype(float))
    expected, by_prob = lovasz_of(prob[counted], labels[counted])
    by_logit = np.zeros(logits.shape)  # through the softmax
    mean = (by_prob * prob[counted]).sum(-1, keepdims=True)
    by_logit[counted] = prob[counted] * (by_prob - mean)
    ours, grad = jax.value_and_grad(losses.lovasz_softmax)(jnp.asarray(logits), jnp.asarray(labels))
    assert float(ours) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad, by_logit, atol=1e-6)


def test_lovasz_softmax_of_sure_answers_is_one_minus_iou(rng):
    labels, said = rng.integers(0, 3, (2, 2, 9, 8))
    iou = [
        ((labels == k) & (said == k)).sum() / ((labels == k) | (said == k)).sum() for k in (0, 1, 2)
    ]
    ours = losses.lovasz_softmax(1e3 * jax.nn.one_hot(said, 3), jnp.asarray(labels))
    assert float(ours) == pytest.approx(1 - np.mean(iou), rel=1e-5)


def test_lovasz_weights_keep_their_digits_over_many_pixels(rng):
    """As differences of ratios in float32, every tenth would be wrong by a percent or more."""
    logits = rng.standard_normal((1, 500, 500, 2)).astype(np.float32)
    labels = (rng.random((1, 500, 500)) < 0.01).astype(np.int32)
    prob = np.asarray(jax.nn.softmax(jnp.asarray(logits)), np.float64).reshape(-1, 2)
    _, by_prob = lovasz_of(prob, labels.ravel())
    by_logit = prob[:, 0] * prob[:, 1] * (by_prob[:, 0] - by_prob[:, 1])
    grad = jax.grad(losses.lovasz_softmax)(jnp.asarray(logits), jnp.asarray(labels))
    apart = np.abs(np.asarray(grad)[..., 0].ravel() - by_logit)
    assert apart.sum() < 1e-4 * np.abs(by_logit).sum()


@pytest.mark.parametrize('weights', [(), (0.2, 1.0, 3.0)])
@pytest.mark.parametrize('share', [0.01, 0.25, 0.5, 1.0])
def test_top_k_is_the_cross_entropy_of_the_costliest_pixels(rng, share, weights):
    logits, labels = example(rng)
    counted = labels != IGNORE
    own = labels[counted]
    weight = np.array(weights)[own] if weights else np.ones(len(own))
    cost = -weight * np.log(softmax(logits)[counted][np.arange(len(own)), own])
    first = np.argsort(-cost)[: max(round(share * len(own)), 1)]
    expected = cost[first].sum() / weight[first].sum()
    options = {'class_weights': weights}
    ours = losses.top_k_cross_entropy(logits, jnp.asarray(labels), share=share, **options)
    assert float(ours) == pytest.approx(expected, rel=1e-5)
    if share == 1.0:
        plain = losses.cross_entropy(logits, jnp.asarray(labels), **options)
        assert float(ours) == pytest.approx(float(plain), rel=1e-6)


def test_top_k_and_its_gradient_are_pytorchs(rng):
    """nnU-Net's TopKLoss: torch's cross-entropy of each pixel, and the mean of the largest."""
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    logits, labels = all_counted(rng)
    theirs = torch.from_numpy(logits.transpose(0, 3, 1, 2).copy()).requires_grad_()
    each = torch.nn.functional.cross_entropy(theirs, torch.from_numpy(labels), reduction='none')
    expected = torch.topk(each.ravel(), labels.size // 4, sorted=False)[0].mean()
    expected.backward()
    value, grad = jax.value_and_grad(losses.top_k_cross_entropy)(
        jnp.asarray(logits), jnp.asarray(labels), share=0.25
    )
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(
        np.asarray(grad).transpose(0, 3, 1, 2), theirs.grad.numpy(), atol=1e-6
    )


def one_hot2dist(inside):
    """The map of Kervadec's code, by SciPy's distances."""
    if not inside.any() or inside.all():
        return np.zeros(inside.shape)
    outside_distance = ndimage.distance_transform_edt(~inside)
    inside_distance = ndimage.distance_transform_edt(inside) - 1
    return outside_distance * ~inside - inside_distance * inside


@pytest.mark.parametrize('share', [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize('size', [(1, 9), (23, 31), (40, 17)])
def test_the_signed_distance_is_the_authors_map(rng, size, share):
    inside = rng.random((3, *size, 2)) < share
    ours = losses.signed_distance(jnp.asarray(inside), jnp.asarray(~inside))
    for b, s in np.ndindex(3, 2):
        np.testing.assert_allclose(ours[b, :, :, s], one_hot2dist(inside[b, :, :, s]), atol=1e-4)


def test_the_signed_distance_of_a_row_by_hand():
    """? is neither inside nor outside, and nothing is measured to it."""
    row = '..##?.###.'
    inside, outside = (np.array([[[[c == kind] for c in row]]]) for kind in '#.')
    ours = losses.signed_distance(jnp.asarray(inside), jnp.asarray(outside))
    assert np.ravel(ours).tolist() == [2, 1, 0, -1, 0, 1, 0, -1, 0, 1]


def test_boundary_by_scipys_distances(rng):
    logits, labels = all_counted(rng)
    labels[0][labels[0] == 1] = 0  # an image without class 1
    prob = softmax(logits)
    maps = [[one_hot2dist(mask == k) for k in (1, 2)] for mask in labels]
    expected = (prob[..., 1:] * np.moveaxis(np.array(maps), 1, -1)).mean()
    ours = losses.boundary(jnp.asarray(logits), jnp.asarray(labels))
    assert float(ours) == pytest.approx(expected, rel=1e-5)


def test_boundary_costs_more_the_further_a_blob_is_from_its_place():
    def blob(left):
        mask = np.zeros((1, 30, 60), np.int32)
        mask[0, 10:20, left : left + 10] = 1
        return jnp.asarray(mask)

    cost = [
        losses.boundary(9.0 * jax.nn.one_hot(blob(left), 2), blob(10)) for left in (10, 14, 25, 45)
    ]
    assert cost == sorted(cost)
    assert cost[0] < 0 < cost[-1]


def test_a_class_that_is_ignored_is_in_no_mean_of_dice(rng):
    """With class 2 ignored of four: as with classes 1 and 3 alone, over the other pixels."""
    logits = rng.standard_normal((2, 5, 6, 4)).astype(np.float32)
    labels = rng.integers(0, 4, (2, 5, 6))
    counted = labels != 2
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    dice = [
        (2 * (prob[..., k] * (labels == k))[counted].sum() + 1)
        / ((prob[..., k] + (labels == k))[counted].sum() + 1)
        for k in (1, 3)
    ]
    found = losses.soft_dice(jnp.asarray(logits), jnp.asarray(labels), ignore_label=2)
    assert float(found) == pytest.approx(1 - np.mean(dice), rel=1e-5)
