"""Places a step on devices: over a mesh, with the slices on the devices, or with pmap."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pspnet_jax.runtime import compilation


class Placed(NamedTuple):
    """A step on devices, and functions that move state and batch there and back.

    `compile(state, batch)` returns the step for batches of that shape and the cost of compiling
    it. A step returns its metrics as vectors with one value per update.
    """

    compile: Callable[[Any, Any], tuple[Callable, dict[str, float]]]
    put_state: Callable[[Any], Any]
    put_batch: Callable[[Any], Any]
    get_state: Callable[[Any], Any]


def _as_vectors(step: Callable) -> Callable:
    """`step`, with an axis of length 1 in front of each metric."""

    def run(state, batch):
        state, metrics = step(state, batch)
        return state, jax.tree.map(lambda x: x[None], metrics)

    return run


def over_mesh(step: Callable) -> Placed:
    """`step` jitted over a one-axis mesh: batch split, state on every device and donated."""
    mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
    jitted = compilation.jit(
        _as_vectors(step),
        donate_argnums=0,
        in_shardings=(whole, split),
        out_shardings=(whole, whole),
    )
    return Placed(
        functools.partial(compilation.compile_now, jitted),
        put_state=lambda state: _put_whole(state, whole),
        put_batch=lambda batch: jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(split, x), batch
        ),
        get_state=_get_whole,
    )


def over_mesh_cached(step: Callable, store: dict[str, np.ndarray]) -> Placed:
    """`over_mesh` for a data set that every device holds: a batch is k B row numbers of `store`.

    The k updates are one program (`lax.scan`) that gathers, normalises, augments and steps;
    `pipeline.store` makes the store. The updates equal those of k batches from the host.
    """
    mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, 'data'))

    def steps(state, store, rows_kB):
        return jax.lax.scan(lambda state, rows: step(state, gather(store, rows)), state, rows_kB)

    jitted = compilation.jit(
        steps,
        donate_argnums=0,
        in_shardings=(whole, whole, split),
        out_shardings=(whole, whole),
    )
    placed_store = _put_whole(store, whole)

    def compile_steps(state, rows_kB):
        compiled, facts = compilation.compile_now(jitted, state, placed_store, rows_kB)
        return lambda state, rows_kB: compiled(state, placed_store, rows_kB), facts

    return Placed(
        compile_steps,
        put_state=lambda state: _put_whole(state, whole),
        put_batch=lambda rows: jax.make_array_from_process_local_data(split, rows),
        get_state=_get_whole,
    )


def _put_whole(tree, whole: NamedSharding):
    """Put `tree`, which is the same in all processes, on every device of all of them."""
    if jax.process_count() > 1:
        tree = jax.device_get(tree)
    return jax.device_put(tree, whole)


def _get_whole(tree):
    """A tree that every device has, for this process only; on the host if there are several."""
    return tree if jax.process_count() == 1 else jax.device_get(tree)


def gather(store: dict[str, jax.Array], rows_B: jax.Array) -> dict[str, jax.Array]:
    """The batch of these rows, equal to what `pipeline.batches` makes on the host."""
    low, high, mean, std = jnp.moveaxis(store['intensity'][rows_B][:, :, None, None], 1, 0)
    image = store['image'][rows_B].astype(jnp.float32)
    image = (jnp.clip(image, low, high) - mean) * (1 / std)
    top, left, height, width = jnp.moveaxis(store['content'][rows_B][..., None, None], 1, 0)
    rows, columns = jnp.mgrid[: image.shape[1], : image.shape[2]][:, None]  # 1 H W each
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    image = jnp.where(inside[..., None], image, 0.0)
    return {'image': image, 'mask': store['mask'][rows_B].astype(jnp.int32)}


def under_pmap(step: Callable) -> Placed:
    """`step(..., axis_name='data')` under `jax.pmap`: a copy of the state per device, donated."""
    n = jax.local_device_count()
    step = _as_vectors(functools.partial(step, axis_name='data'))
    mapped = jax.pmap(step, axis_name='data', donate_argnums=0)
    devices = [x for process in range(jax.process_count()) for x in jax.local_devices(process)]
    split = NamedSharding(Mesh(devices, ('data',)), P('data'))  # pmap's sharding

    def put(tree):
        # A step that was compiled ahead takes only arrays over all processes.
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), tree)

    def first(tree):
        # This process's shard: an array over several processes can't be indexed.
        return jax.tree.map(lambda x: x.addressable_data(0).reshape(x.shape[1:]), tree)

    def compile_step(state, batch):
        compiled, facts = compilation.compile_now(mapped, state, batch)

        def run(state, batch):
            state, metrics = compiled(state, batch)
            return state, first(metrics)

        return run, facts

    return Placed(
        compile_step,
        put_state=lambda state: put(
            jax.tree.map(lambda x: np.stack([x] * n), jax.device_get(state))
        ),
        put_batch=lambda batch: put(
            jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)
        ),
        get_state=lambda state: jax.device_get(first(state)),
    )
