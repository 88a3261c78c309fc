"""Optimiser and learning-rate schedule from the config's plain values."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def warmup_length(steps: int, *, warmup: float, warmup_steps: int) -> int:
    """Steps of a warm-up that is `warmup` of the run, but at most `warmup_steps`."""
    return min(warmup_steps, round(warmup * steps))


def learning_rate_schedule(
    name: str, *, learning_rate: float, steps: int, warmup_steps: int = 0, power: float = 0.9
) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then poly, cosine or constant decay.

    poly is (1 - progress)^power at every iteration (PSPNet, section 5.1); progress goes from 0 at
    the end of the warm-up to 1 at the end of the run.
    """
    decays = {
        'poly': lambda progress: (1.0 - progress) ** power,
        'cosine': lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
        'constant': jnp.ones_like,
    }
    if name not in decays:
        raise ValueError(f'optim.schedule {name!r} is not one of {", ".join(decays)}')
    decay = decays[name]

    def rate(step):
        after = jnp.maximum(step - warmup_steps, 0)
        progress = jnp.minimum(after / max(steps - warmup_steps, 1), 1.0)
        warmup = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)
        return learning_rate * warmup * decay(progress)

    return rate


def create(
    options: Mapping[str, Any], *, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of the config's section `optim`, as in PyTorch, and its learning-rate schedule.

    Weight decay spares parameters whose last name is in `decay_exclude` ('bias', 'scale'). AdamW
    decouples it; all others add it to the gradient, before momentum and scaling, as PyTorch does.
    adagrad's sum of squares starts at Keras' 0.1. Layers outside the backbone learn
    `new_layer_factor` times faster. Gradients longer than `clip_norm` are scaled to it; 0 turns
    that off. Raises ValueError for an unknown optimiser or schedule.
    """
    name, momentum, beta2, rho = (options[key] for key in ('name', 'momentum', 'beta2', 'rho'))
    rate = learning_rate_schedule(
        options['schedule'],
        learning_rate=options['learning_rate'],
        steps=steps,
        warmup_steps=warmup_length(
            steps, warmup=options['warmup'], warmup_steps=options['warmup_steps']
        ),
        power=options['power'],
    )
    spared, clip_norm = options['decay_exclude'], options['clip_norm']
    decay = optax.add_decayed_weights(
        options['weight_decay'],
        mask=lambda params: _map_path(params, lambda path: path[-1] not in spared),
    )
    bodies = {
        'sgd': (decay, optax.trace(decay=momentum)),
        'adamw': (optax.scale_by_adam(b1=momentum, b2=beta2), decay),
        'adam': (decay, optax.scale_by_adam(b1=momentum, b2=beta2)),
        'adamax': (decay, optax.scale_by_adamax(b1=momentum, b2=beta2)),
        'rmsprop': (decay, optax.scale_by_rms(decay=rho, eps_in_sqrt=False)),
        'adagrad': (decay, optax.scale_by_rss(initial_accumulator_value=0.1)),
        'adadelta': (decay, optax.scale_by_adadelta(rho=rho)),
    }
    if name not in bodies:
        raise ValueError(f'optim.name {name!r} is not one of {", ".join(bodies)}')
    clip = (optax.clip_by_global_norm(clip_norm),) if clip_norm > 0 else ()
    faster = optax.masked(
        optax.scale(options['new_layer_factor']),
        lambda params: _map_path(params, lambda path: path[0] != 'backbone'),
    )
    return optax.chain(*clip, *bodies[name], faster, optax.scale_by_learning_rate(rate)), rate


def _map_path(params, fn):
    return jax.tree_util.tree_map_with_path(lambda path, _: fn([p.key for p in path]), params)
