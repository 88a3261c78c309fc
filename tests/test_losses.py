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
