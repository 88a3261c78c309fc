"""Schedules at their ends, and optimisers against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspnet_jax.config import RULES, base
from pspnet_jax.training import optim


@pytest.mark.parametrize('name', ['poly', 'cosine'])
def test_decay_starts_full_and_ends_at_zero(name):
    rate = optim.learning_rate_schedule(name, learning_rate=0.1, steps=100)
    values = np.array([rate(step) for step in range(101)])
    assert values[0] == pytest.approx(0.1)
    assert values[-1] == pytest.approx(0, abs=1e-7)
    assert (np.diff(values) < 0).all()


def test_poly_is_the_papers():
    rate = optim.learning_rate_schedule('poly', learning_rate=0.01, steps=200, power=0.9)
    assert float(rate(50)) == pytest.approx(0.01 * (1 - 50 / 200) ** 0.9)


def test_warm_up_rises_evenly_to_the_constant():
    rate = optim.learning_rate_schedule('constant', learning_rate=1.0, steps=9, warmup_steps=4)
    assert [float(rate(step)) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_decay_begins_where_the_warm_up_ends():
    """Both ends of the poly curve are the run's without its warm-up, and the rate is reached."""
    rate = optim.learning_rate_schedule('poly', learning_rate=1.0, steps=14, warmup_steps=4)
    after = [(1 - k / 10) ** 0.9 for k in range(11)]
    values = [float(rate(step)) for step in range(4, 15)]
    np.testing.assert_allclose(values, after, atol=1e-6)
    assert float(rate(3)) == 1.0


@pytest.mark.parametrize(('steps', 'length'), [(5, 0), (56, 6), (400, 40), (500, 50), (9000, 50)])
def test_the_warm_up_is_a_tenth_of_the_run_and_at_most_50_steps(steps, length):
    assert optim.warmup_length(steps, warmup=0.1, warmup_steps=50) == length


def create(**changes):
    """An optimiser that does nothing but its own: one rate for all, no decay, no clipping."""
    plain = {'schedule': 'constant', 'warmup': 0.0, 'new_layer_factor': 1.0, 'clip_norm': 0.0,
             'weight_decay': 0.0, 'decay_exclude': ()}  # fmt: skip
    return optim.create({**base.get_config().optim, **plain, **changes}, steps=10)[0]


PEERS = {
    'sgd': ('SGD', {'momentum': 0.9}),
    'adamw': ('AdamW', {'betas': (0.9, 0.999)}),
    'adam': ('Adam', {'betas': (0.9, 0.999)}),
    'adamax': ('Adamax', {'betas': (0.9, 0.999)}),
    'rmsprop': ('RMSprop', {'alpha': 0.9}),
    'adagrad': ('Adagrad', {'initial_accumulator_value': 0.1}),
    'adadelta': ('Adadelta', {'rho': 0.9}),
}


def test_every_optimiser_has_its_peer():
    assert all(f"'{name}'" in RULES['optim.name'][1] for name in PEERS)
    assert RULES['optim.name'][1].count("'") == 2 * len(PEERS)


@pytest.mark.parametrize('name', PEERS)
def test_optimiser_follows_pytorchs(rng, name):
    torch = pytest.importorskip('torch', reason='PyTorch is the reference')
    start = rng.standard_normal((4, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    kind, options = PEERS[name]
    peer = getattr(torch.optim, kind)([theirs], lr=0.1, weight_decay=0.01, **options)
    tx = create(name=name, learning_rate=0.1, weight_decay=0.01)
    params = {'backbone': {'kernel': jnp.asarray(start)}}
    state = tx.init(params)
    for _ in range(6):
        grad = rng.standard_normal((4, 3)).astype(np.float32)
        theirs.grad = torch.from_numpy(grad)
        peer.step()
        updates, state = tx.update({'backbone': {'kernel': jnp.asarray(grad)}}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params['backbone']['kernel'], theirs.detach().numpy(), atol=1e-5)


def step(options, params, grads):
    tx = create(name='sgd', learning_rate=1.0, **options)
    updates, _ = tx.update(grads, tx.init(params), params)
    return jax.tree.map(float, updates)


PARAMS = {'backbone': {'kernel': 2.0, 'bias': 2.0}, 'head': {'kernel': 2.0, 'scale': 2.0}}
PARAMS = jax.tree.map(jnp.float32, PARAMS)


def test_new_layers_learn_ten_times_faster():
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    updates = step({'new_layer_factor': 10.0}, PARAMS, ones)
    assert updates == {
        'backbone': {'kernel': -1.0, 'bias': -1.0},
        'head': {'kernel': -10.0, 'scale': -10.0},
    }


def test_weight_decay_spares_the_excluded():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    options = {'weight_decay': 0.5, 'decay_exclude': ('bias', 'scale')}
    assert step(options, PARAMS, zeros) == {
        'backbone': {'kernel': -1.0, 'bias': 0.0},
        'head': {'kernel': -1.0, 'scale': 0.0},
    }


def test_clipping_keeps_the_direction_and_caps_the_length():
    grads = jax.tree.map(lambda x: 3.0 * x, jax.tree.map(jnp.ones_like, PARAMS))  # length 6
    updates = step({'clip_norm': 1.5}, PARAMS, grads)
    assert jax.tree.leaves(updates) == pytest.approx([-0.75] * 4)


@pytest.mark.parametrize('change', [{'name': 'lion'}, {'schedule': 'linear'}])
def test_unknown_names_are_refused(change):
    with pytest.raises(ValueError, match='is not one of'):
        create(**change)
