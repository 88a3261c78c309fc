"""Losses against PyTorch's and against sums done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import losses

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
