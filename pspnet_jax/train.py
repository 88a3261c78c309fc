"""The training step and the loop around it.

`train_step` is a pure function of state and batch. `over_mesh` jits it over all
devices, `under_pmap` maps it; both give the same numbers (tests/test_parallel.py).
"""

import collections
import contextlib
import functools
import json
import logging
import math
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from pspnet_jax import (
    charts,
    checkpoint,
    compilation,
    faults,
    hosts,
    infer,
    losses,
    models,
    optim,
    paths,
    transfer,
    visualize,
)
from pspnet_jax.config import from_dict, to_dict, validate, with_absolute_paths
from pspnet_jax.data import pipeline, sources, splits, volumes
from pspnet_jax.data.augment import augment
from pspnet_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteLossError,
    StoppedError,
)
from pspnet_jax.evaluate import evaluate_checkpoint, evaluate_options, evaluate_volumes
from pspnet_jax.log import MetricLog, Silent
from pspnet_jax.models import weights
from pspnet_jax.models.convolution import CONVOLVED
from pspnet_jax.models.layers import adaptive_pools, global_indices, resize
from pspnet_jax.storage import writing

logger = logging.getLogger(__name__)

# (key, image H W C, mask H W) -> (image, mask), traced inside the compiled step.
AugmentFn = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# (logits B h w K, labels B h w, of the global batch) -> scalar, traced there too.
LossFn = Callable[[jax.Array, jax.Array], jax.Array]

COMPILED = (
    'program of %d update(s): compiled in %.1f s, %.1f GFLOP, %.0f MB of temporaries, %.0f in all'
)


@flax.struct.dataclass
class TrainState:
    """All that a step changes. `ema_params` is None where no average is kept; where one is, it is
    evaluated with the live `batch_stats`, of which there is no average.

    And the teacher's variables, which it gives back as they are: here they are arguments of
    the program and not constants in it. Checkpoints leave them out.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any
    teacher: Any = None


def create_state(model: nn.Module, tx, *, seed: int, channels: int, ema: bool) -> TrainState:
    """Random parameters from `seed` for images of `channels` channels."""

    def make(key: jax.Array) -> TrainState:  # one program: on a GPU each small one costs 0.1 s
        image = jnp.zeros((1, 64, 64, channels), jnp.float32)  # no parameter depends on the size
        variables = model.init(key, image, train=False)
        params = variables['params']
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get('batch_stats', {}),
            opt_state=tx.init(params),
            ema_params=params if ema else None,
        )

    return compilation.jit(make)(jax.random.key(seed))


def segmentation_loss(
    out: dict[str, jax.Array],
    labels_BHW: jax.Array,
    *,
    aux: float,
    ignore_label: int,
    axis_name: str | None,
    extra: dict[str, float] | None = None,
    loss_fn: LossFn | None = None,
    **knobs: Any,
) -> jax.Array:
    """The sum of `losses.TERMS` and of `loss_fn`, and `aux` times the same for every other output.

    `knobs` are the rest of the config's section `loss`: each term's weight, at 0 of which it is
    not computed, and what the terms read; `extra` has the weights of terms without a knob.
    `loss_fn` sees the logits and labels of the whole batch, whatever number of devices share it.
    Smaller logits meet the labels at the centres of their cells, where `infer.probabilities`
    puts them when it enlarges them: labels are never interpolated.
    """

    terms = {name: knobs[name] for name in losses.TERMS if name in knobs} | (extra or {})

    def one_head(logits_BhwK):
        labels_Bhw = labels_at(labels_BHW, logits_BhwK.shape[1:3])
        shared = {'ignore_label': ignore_label, 'axis_name': axis_name}
        total = 0.0
        for name, weight in terms.items():
            if weight:
                loss, own = losses.TERMS[name]
                options = {argument: knobs[knob] for argument, knob in own.items()}
                total += weight * loss(logits_BhwK, labels_Bhw, **options, **shared)
        if loss_fn is not None:
            total += loss_fn(*(losses.gather(x, axis_name) for x in (logits_BhwK, labels_Bhw)))
        return total

    total = one_head(out['logits'])
    if aux:
        total += aux * sum(one_head(x) for name, x in out.items() if name != 'logits')
    return total


def labels_at(labels_BHW: jax.Array, size: tuple[int, int]) -> jax.Array:
    """B h w: the labels at the centres of h x w cells, as `volumes.resize_labels` has them."""
    rows, columns = map(volumes.centres, size, labels_BHW.shape[1:])
    return labels_BHW[:, rows][:, :, columns]


def forward(model: nn.Module, variables, image_BHWC: jax.Array, *, features: bool, **options):
    """(outputs, batch statistics, features) of a network in training or inference.

    `features` asks for its backbone's last map, B h w C; else they are None.
    """

    def is_backbone(module: nn.Module, method: str) -> bool:
        return module.path == ('backbone',) and method == '__call__'

    out, updates = model.apply(
        variables,
        image_BHWC,
        mutable=['batch_stats', 'intermediates'],
        capture_intermediates=is_backbone if features else False,
        **options,
    )
    # The last of its calls: deeplab_v2 has one for each scale, the largest at the end.
    last = updates['intermediates']['backbone']['__call__'][-1][32] if features else None
    return out, updates.get('batch_stats', {}), last


def teacher_losses(
    logits_BhwK: jax.Array,
    features: jax.Array | None,
    teacher_logits: jax.Array,
    teacher_features: jax.Array | None,
    labels_BHW: jax.Array,
    *,
    loss: str,
    weight: float,
    temperature: float,
    pairwise: float,
    nodes: int,
    ignore_label: int,
    axis_name: str | None,
) -> dict[str, jax.Array]:
    """{'distillation', 'pairwise'}: what the teacher adds to the loss, each times its weight.

    Its logits are resized to the student's. The affinities are between `nodes` x `nodes` cells,
    averages of the maps; image-segmentation-keras has maxima of 4 x 4 features.
    """
    parts = {}
    if weight:
        size = logits_BhwK.shape[1:3]
        parts['distillation'] = weight * losses.distillation(
            logits_BhwK,
            resize(teacher_logits, size, align_corners=False),
            labels_at(labels_BHW, size),
            loss=loss,
            temperature=temperature,
            ignore_label=ignore_label,
            axis_name=axis_name,
        )
    if pairwise:
        cells = [
            adaptive_pools(x.astype(jnp.float32), (nodes,))[0] for x in (features, teacher_features)
        ]
        parts['pairwise'] = pairwise * losses.pairwise_affinity(*cells, axis_name=axis_name)
    return parts


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_options: dict[str, Any],
    augment_options: dict[str, Any],
    seed: int,
    accumulate: int = 1,
    remat: str = 'none',
    ema_decay: float = 0.0,
    nan_policy: str = 'stop',
    augment_fn: AugmentFn | None = None,
    loss_fn: LossFn | None = None,
    teacher: nn.Module | None = None,
    distill_options: dict[str, Any] | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from {'image': B H W C, 'mask': B H W}; metrics: loss, gradient_norm.

    Randomness is a function of seed, step and the example's place in the global batch.
    With `accumulate` = k the gradient is the mean over k micro-batches, every k-th
    example each, in one compiled loop; BatchNorm then sees B/k images at a time.
    With `remat` 'pointwise' the outputs of convolutions are kept for the gradient and all
    that lies between them, BatchNorm and ReLU mostly, is computed again.
    With `nan_policy` 'skip' a loss or gradient that is no number changes nothing but the step;
    the metric 'skipped' is 1 there. `augment_fn` changes each example behind `augment`; `loss_fn`
    is added to the config's losses.
    `teacher` sees the same images in inference mode, with `state.teacher`; what it adds to the
    loss is in the metrics.
    """
    if axis_name is not None:
        model = models.over_axis(model, axis_name)  # BatchNorm and dropout over all devices
    augment_key, dropout_key = jax.random.split(
        jax.random.fold_in(jax.random.key(seed), state.step)
    )
    index_B = global_indices(batch['image'].shape[0], axis_name)
    keys_B = jax.vmap(lambda i: jax.random.fold_in(augment_key, i))(index_B)

    def change(key, image_HWC, mask_HW):
        image_HWC, mask_HW = augment(
            key, image_HWC, mask_HW, ignore_label=loss_options['ignore_label'], **augment_options
        )
        if augment_fn is not None:
            own_key = jax.random.fold_in(key, 1000)  # beyond those that `augment` splits it into
            image_HWC, mask_HW = augment_fn(own_key, image_HWC, mask_HW)
        return image_HWC, mask_HW

    image, mask = jax.vmap(change)(keys_B, batch['image'], batch['mask'])
    features = teacher is not None and distill_options['pairwise'] > 0

    def total_loss(params, batch_stats, image, mask, taught, key):
        out, batch_stats, last = forward(
            model,
            {'params': params, 'batch_stats': batch_stats},
            image,
            features=features,
            train=True,
            rngs={'dropout': key},
        )
        shared, parts = {'axis_name': axis_name, 'loss_fn': loss_fn}, {}
        loss = segmentation_loss(out, mask, **shared, **loss_options)
        if teacher is not None:
            options = distill_options | {'ignore_label': loss_options['ignore_label']}
            parts = teacher_losses(
                out['logits'], last, *taught, mask, axis_name=axis_name, **options
            )
        return loss + sum(parts.values()), (batch_stats, parts)

    if remat == 'pointwise':
        keep = jax.checkpoint_policies.save_only_these_names(CONVOLVED)
        total_loss = jax.checkpoint(total_loss, policy=keep)
    elif remat != 'none':
        raise ValueError(f"train.remat {remat!r} is not one of 'none', 'pointwise'")

    def micro_step(carry, micro):
        (batch_stats, i), taught = carry, None
        if teacher is not None:  # outside of what is differentiated and computed again
            out, _, last = forward(teacher, state.teacher, micro[0], features=features, train=False)
            taught = (out['logits'], last)
        (loss, (batch_stats, parts)), grads = jax.value_and_grad(total_loss, has_aux=True)(
            state.params, batch_stats, *micro, taught, jax.random.fold_in(dropout_key, i)
        )
        return (batch_stats, i + 1), ({'loss': loss, **parts}, grads)

    if accumulate == 1:
        (batch_stats, _), (metrics, grads) = micro_step((state.batch_stats, 0), (image, mask))
    else:
        # B -> k B/k by stride, so that each device keeps its own examples.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), (image, mask)
        )
        (batch_stats, _), stacked = jax.lax.scan(micro_step, (state.batch_stats, 0), micro)
        metrics, grads = jax.tree.map(lambda x: x.mean(axis=0), stacked)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1.0 - ema_decay)
    metrics['gradient_norm'] = optax.tree.norm(grads)
    changed = (params, batch_stats, opt_state, ema_params)
    if nan_policy == 'skip':
        sound = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm'])
        before = (state.params, state.batch_stats, state.opt_state, state.ema_params)
        changed = jax.tree.map(lambda new, old: jnp.where(sound, new, old), changed, before)
        metrics['skipped'] = 1.0 - sound
    return TrainState(state.step + 1, *changed, teacher=state.teacher), metrics


def bind_step(config: ConfigDict, model: nn.Module, tx, **options: Any) -> Callable:
    """`train_step(state, batch)` with what the config decides, and further options of it."""
    decided = {
        'loss_options': config.loss.to_dict(),
        'augment_options': config.augment.to_dict() | {'context': config.data.context},
        'seed': config.seed,
        'accumulate': config.train.accumulate,
        'remat': config.train.remat,
        'ema_decay': config.train.ema_decay,
        'nan_policy': config.train.nan_policy,
    }
    return functools.partial(train_step, model=model, tx=tx, **decided | options)


class Placed(NamedTuple):
    """A step on devices, and how state and batch get there and back.

    `compile(state, batch)` gives the step for batches of that shape and what compiling it
    took. A step returns its metrics as vectors, one value for each update that it made.
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
    """`over_mesh` for a data set that is on every device: a batch is k B rows of `store`.

    The k updates are one program (`lax.scan`) that gathers, normalises, augments and steps;
    `pipeline.store` made the store. The updates are those of k batches of the host.
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
    """`tree`, which is the same in all processes, on every device of all of them."""
    if jax.process_count() > 1:
        tree = jax.device_get(tree)
    return jax.device_put(tree, whole)


def _get_whole(tree):
    """A tree that every device has, for this process alone: on the host if there are several."""
    return tree if jax.process_count() == 1 else jax.device_get(tree)


def gather(store: dict[str, jax.Array], rows_B: jax.Array) -> dict[str, jax.Array]:
    """The batch of these rows, as `pipeline.batches` makes it on the host."""
    low, high, mean, std = jnp.moveaxis(store['intensity'][rows_B][:, :, None, None], 1, 0)
    image = store['image'][rows_B].astype(jnp.float32)
    image = (jnp.clip(image, low, high) - mean) * (1 / std)
    return {'image': image, 'mask': store['mask'][rows_B].astype(jnp.int32)}


def under_pmap(step: Callable) -> Placed:
    """`step(..., axis_name='data')` under `jax.pmap`: a copy of the state per device, donated."""
    n = jax.local_device_count()
    step = _as_vectors(functools.partial(step, axis_name='data'))
    mapped = jax.pmap(step, axis_name='data', donate_argnums=0)
    devices = [x for process in range(jax.process_count()) for x in jax.local_devices(process)]
    split = NamedSharding(Mesh(devices, ('data',)), P('data'))  # as pmap has it

    def put(tree):
        # Arrays over all processes: a step that was compiled ahead takes no others.
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), tree)

    def first(tree):
        # Of this process: an array over several can't be indexed.
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


def parameter_table(params: Any) -> str:
    """Values in each second-level module, and the total."""
    rows = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        rows['/'.join(entry.key for entry in path[:2])] += leaf.size
    rows['total'] = sum(rows.values())
    return '\n'.join(f'  {name:32} {size:12,}' for name, size in rows.items())


def read_metrics(
    pending: list[tuple[int, dict[str, jax.Array]]],
    log: MetricLog,
    rate,
    every: int,
    *,
    skipped: int,
    max_skipped: int,
) -> tuple[float, int]:
    """(last loss, 0 of no updates; updates skipped so far): wait for these, log each `every`-th.

    `pending` has the number of the first update of a call, and a vector of each metric. A
    skipped update is logged with their count so far, and None for what is no number. Raises
    NonFiniteLossError where one is not skipped, and where more than `max_skipped` were.
    """
    loss = 0.0
    for first, metrics in pending:
        vectors = {name: np.asarray(vector).tolist() for name, vector in metrics.items()}
        was_skipped = vectors.pop('skipped', [0.0] * len(vectors['loss']))
        loss = vectors['loss'][-1]
        for i, skip in enumerate(was_skipped):
            step, values = first + i, {name: vector[i] for name, vector in vectors.items()}
            made = step - 1 - skipped  # updates before it, which the optimiser counts
            skipped += int(skip)
            sound = all(map(math.isfinite, values.values()))
            if (not sound and not skip) or skipped > max_skipped:
                why = f': update {skipped} of the run that is' if skip else ''
                raise NonFiniteLossError(
                    f'step {step}{why}: {values}. Nothing after the last checkpoint was kept. '
                    'Look at the learning rate (optim.learning_rate, optim.warmup_steps), '
                    'optim.clip_norm, the class weights, and at the data (python -m '
                    "pspnet_jax.check); train.nan_policy='skip' goes on without up to "
                    'train.max_skipped updates'
                )
            values = {n: v if math.isfinite(v) else None for n, v in values.items()}
            if skip:
                logger.warning('step %d: no number, no update (%d so far)', step, skipped)
                values['skipped'] = skipped
            if skip or step % every == 0:
                log.scalars(step, {**values, 'learning_rate': float(rate(made))})
    return loss, skipped


def pretrained_file(config: ConfigDict) -> Path | None:
    """The file that `model.pretrained` stands for, fetched if it is not on this machine yet.

    None: the weights are random, or train.init_from's. Raises PretrainedError.
    """
    where = config.model.pretrained
    if not where or config.train.init_from:
        return None
    if where != 'imagenet':
        return weights.fetch(where)
    _, backbone, options = models.resolve(**config.model)
    if backbone is None:
        return None  # the network has an encoder of its own
    public = weights.public(backbone, **options)
    if public is None:
        logger.warning(
            'no ImageNet weights are known for %s with model.width=%d and its other options: '
            'it starts from random ones',
            backbone,
            config.model.width,
        )
        return None
    return weights.fetch_public(backbone, public)


def normalize_by_weights(config: ConfigDict) -> bool:
    """Whether images are normalised as the pretrained weights were fed, not by volume."""
    own_choice = 'volume' if config.model.pretrained in ('', 'imagenet') else 'weights'
    return (config.data.normalize or own_choice) == 'weights'


def chosen_normalization(config: ConfigDict) -> weights.Normalization | str | None:
    """What `data.normalize` asks for, as `checkpoint.save` has it: before any weights are read."""
    if config.data.normalize == 'buda':
        return 'buda'
    return weights.IMAGENET if normalize_by_weights(config) else None


def normalize_as_there(
    config: ConfigDict, theirs: weights.Normalization | str | None
) -> weights.Normalization | str | None:
    """Of a run that starts from another: data.normalize's, or where it is None that run's.

    Warns where the two differ.
    """
    if config.data.normalize is None:
        return theirs
    ours = chosen_normalization(config)
    if is_fixed(ours) and is_fixed(theirs):
        ours = theirs
    if ours != theirs:
        there, here = (transfer.words({'normalization': plain(x)}) for x in (theirs, ours))
        logger.warning(
            'images were normalised %s where the weights are from, and are %s here '
            '(data.normalize %r): None takes what was there',
            there,
            here,
            config.data.normalize,
        )
    return ours


def is_fixed(normalization: weights.Normalization | str | None) -> bool:
    """Whether it is the same for all images, and not measured volume by volume."""
    return isinstance(normalization, weights.Normalization)


def plain(normalization: weights.Normalization | str | None) -> dict[str, Any] | str | None:
    """As a checkpoint's 'inputs' have it."""
    return normalization._asdict() if is_fixed(normalization) else normalization


def start_or_resume(
    config: ConfigDict,
    model,
    tx,
    channels: int,
    workdir: str,
    measure: Callable[[], np.ndarray | None] = lambda: None,
):
    """(state, progress, inputs, config): from the newest sound checkpoint, else new, pretrained or
    from another run if asked for. `channels` are a picture's. `inputs` is what the network takes,
    `checkpoint.save`'s; the config is the checkpoint's, None of a new run.

    `measure` is `volumes.joint_range` of the training images, asked for where one scale is for all.
    """
    ema = config.train.ema_decay > 0
    context = config.data.context
    seen = volumes.channels_seen(channels, context)
    state = create_state(model, tx, seed=config.seed, channels=seen, ema=ema)
    for line in parameter_table(state.params).splitlines():
        logger.info('%s', line)
    restored = checkpoint.restore(workdir, state, to_dict(config))
    if restored:
        state, meta = restored
        logger.info('resuming from step %d', state.step)
        return state, meta['progress'], meta['inputs'], meta['config']
    normalization = chosen_normalization(config)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    if config.train.init_from:
        variables, theirs, report = transfer.first_weights(
            variables,
            config.train.init_from,
            channels=channels,
            stem=config.model.stem,
            context=context,
        )
        normalization = normalize_as_there(config, theirs)
        for line in f'weights {report}'.splitlines():
            logger.info('%s', line)
    elif path := pretrained_file(config):
        variables, theirs, report = weights.load_backbone(
            variables,
            str(path),
            stem=config.model.stem,
            unit_deviation=not is_fixed(normalization),
            options=config.model,
            context=context,
        )
        normalization = theirs if is_fixed(normalization) else normalization
        logger.info('%s', report)
    # A copy of the average: the step donates both, and a buffer can be donated once.
    params = variables['params']
    average = jax.tree.map(jnp.copy, params) if ema else None
    state = state.replace(
        params=params, ema_params=average, batch_stats=variables.get('batch_stats', {})
    )
    inputs = {'channels': channels, 'normalization': plain(normalization)}
    if is_fixed(normalization) and (scale := measure()) is not None:
        inputs['range'] = scale.tolist()
    logger.info('images are normalised %s', transfer.words(inputs))
    return state, {'best_dice': None, 'stale': 0, 'skipped': 0}, inputs, None


def validate_volumes(
    predict, state: TrainState, slices: volumes.Slices, intensity, config, log
) -> float:
    """Mean Dice over the validation volumes; logs it with a few pictures."""
    params = state.params if state.ema_params is None else state.ema_params
    variables = {'params': params, 'batch_stats': state.batch_stats}
    pictures = []
    result = evaluate_volumes(
        functools.partial(predict, variables),
        volumes.iterate_volumes(volumes.select(slices, hosts.share(sorted(slices.intensity)))),
        order=sorted(slices.intensity),
        intensity=intensity,
        **evaluate_options(config),
        each=lambda volume, pred: pictures.append(visualize.volume_picture(volume, pred)),
    )
    step, summary = int(state.step), result['summary']
    dice = summary['dice']['mean']
    log.scalars(
        step,
        {
            'validation/dice': dice,
            'validation/dice_median': summary['dice']['median'],
            'validation/hd95': summary['hd95']['mean'],
        },
    )
    for i, picture in enumerate(pictures[:4]):
        log.image(step, f'validation/{i}', picture)
    return -1.0 if dice is None else dice


def loader(
    config: ConfigDict,
    slices: volumes.Slices,
    step_fn,
    intensity,
    first_step: int,
    unread: dict[int, str],
):
    """(placed, next_batch): the step on all devices, and what `placed.put_batch` takes for its
    next `count` updates, from the one behind `first_step` on.

    `count` is 1 unless the slices are on the device, where a batch is their rows. `unread`
    collects the faults of slices that are passed over, where the config says so.
    """
    data, batch_size = config.data, config.train.batch_size
    slices = volumes.with_context(slices, data.context)
    intensity = None if intensity is None else volumes.tile(intensity, data.context)
    drawn = pipeline.draws(
        slices, seed=config.seed, sampling=data.sampling, lesion_floor=data.lesion_floor
    )
    places = {
        'batch_size': batch_size,
        'first_step': first_step,
        'shard': (jax.process_index(), jax.process_count()),
    }
    read = {'intensity': intensity, 'unread': unread if data.bad_slices == 'skip' else None}
    if data.cache == 'device':
        store = pipeline.store(slices, **read)
        logger.info('%.0f MB of slices are on the device', pipeline.megabytes(store))
        rows = pipeline.rows(drawn, **places)
        return over_mesh_cached(step_fn, store), lambda count: np.stack(
            [next(rows) for _ in range(count)]
        )
    batches = pipeline.batches(slices, drawn, threads=data.threads, **read, **places)
    placed = under_pmap(step_fn) if config.parallel == 'pmap' else over_mesh(step_fn)
    return placed, lambda count: next(batches)


def name_classes(config: ConfigDict, names: Sequence[str]) -> ConfigDict:
    """The config with these names of its classes, if it has none of its own."""
    if config.model.class_names or len(names) != config.model.num_classes:
        return config
    config = config.copy_and_resolve_references()
    config.model.class_names = tuple(names)
    validate(config, own_loss=True)  # the losses were looked at before
    return config


def stored_class_names(workdir: str) -> Sequence[str]:
    """Those of the run's newest sound checkpoint; () where there is none."""
    for step in reversed(checkpoint.steps(workdir)):
        with contextlib.suppress(CheckpointError, ConfigError):
            return from_dict(checkpoint.metadata(workdir, step)['config']).model.class_names
    return ()


def nothing(*_) -> None:
    """What a hook does where none was given."""


def train_and_evaluate(
    config: ConfigDict,
    workdir: str,
    *,
    augment_fn: AugmentFn | None = None,
    loss_fn: LossFn | None = None,
    on_log: Callable[[int, dict[str, float | None]], object] = nothing,
    on_validation: Callable[[int, float, TrainState], object] = nothing,
) -> dict[str, Any]:
    """Train, validate and checkpoint in `workdir`, going on where it stopped; then evaluate.

    Hooks add and take nothing away. `augment_fn(key, image_HWC, mask_HW)` changes each example
    behind the built-in augmentation, the channels of its `data.context` with it.
    `loss_fn(logits_BHWK, labels_BHW)` is one more term of the loss, for the main output and (times
    loss.aux) each auxiliary one: it sees the whole batch on any number of devices, and stands alone
    with loss.cross_entropy=0 and loss.dice=0. A loss whose weight the config keeps is an entry of
    `losses.TERMS`. `on_log(step, values)` gets every record of metrics.jsonl,
    `on_validation(step, dice, state)` every validated state once its checkpoint is under way: the
    next step reuses its arrays, so copy what is kept.
    Returns the evaluation of the test cases, else of the validation cases, as
    `evaluate.evaluate_checkpoint` does; {} where there are neither. Raises
    ConfigError, DataError, PretrainedError, CheckpointError, NonFiniteLossError.
    """
    validate(config, own_loss=loss_fn is not None)
    check_extra(config.loss.to_dict()['extra'] or {})
    config, workdir = with_absolute_paths(config), str(paths.local(workdir))
    logger.info('config:\n%s', config)
    batch_size = config.train.batch_size
    if batch_size % jax.device_count():
        near = ' or '.join(map(str, hosts.nearest_batches(batch_size, jax.device_count())))
        raise ConfigError(
            f'train.batch_size {batch_size} does not divide over {jax.device_count()} devices: '
            f'take {near}'
        )

    if config.parallel == 'pmap' and batch_size // jax.device_count() % config.train.accumulate:
        raise ConfigError(
            f'train.accumulate={config.train.accumulate} does not divide the '
            f'{batch_size // jax.device_count()} slices that each device gets of '
            f"train.batch_size={batch_size} under parallel='pmap': change one"
        )

    # A new run needs its first weights: fetched before the data is read, which can take minutes.
    # Data that is not there is reported first: below.
    source = config.data.source
    if not checkpoint.steps(workdir) and (not source or Path(source).expanduser().exists()):
        pretrained_file(config)

    # Data: which patients, and how many of their slices hold a lesion. What annotations call the
    # classes is kept with the run, so that their numbers stay the same in every other file.
    config = name_classes(config, stored_class_names(workdir))
    slices, parts = sources.load(config)
    paths.remember(sources.places(config))
    config = name_classes(config, slices.class_names)
    split = {name: volumes.select(slices, patients) for name, patients in parts.items()}
    if config.data.size:  # validation and test stay at their own size
        split['train'] = volumes.resized(split['train'], config.data.size)
    check_crop(config.augment.crop, split['train'])
    if config.data.cache == 'memory':
        for name in ('train', 'validation'):  # each at most half: together they fit
            split[name] = volumes.in_memory(split[name])
    for name, part in split.items():
        logger.info('%s: %s', name, volumes.describe(part))

    with faults.alone(workdir) if hosts.is_first() else contextlib.nullcontext():
        run_steps(
            config,
            workdir,
            split,
            keep_split=lambda: splits.keep(Path(workdir) / splits.KEPT, parts, slices),
            augment_fn=augment_fn,
            loss_fn=loss_fn,
            on_log=on_log,
            on_validation=on_validation,
        )
        if not parts['test'] and not parts['validation']:
            logger.info('there is no test or validation case: nothing is evaluated')
            return {}
        part = 'test' if parts['test'] else 'validation'
        return evaluate_checkpoint(workdir, split=part, trusted=True)


def check_extra(extra: dict[str, float]) -> None:
    """Raise ConfigError for a weight of a loss that nobody has added to `losses.TERMS`."""
    if unknown := sorted(extra.keys() - losses.TERMS.keys()):
        raise ConfigError(
            f'loss.extra gives a weight to {", ".join(unknown)}, which losses.TERMS has not: add '
            f"it before training, as in losses.TERMS['{unknown[0]}'] = (function, {{}})"
        )


def check_crop(crop: int, slices: volumes.Slices) -> None:
    """Raise ConfigError for a crop that is larger than the first slice; all have one size."""
    if not len(slices):
        raise ConfigError('no case is left to train on: lower data.test_fraction')
    height, width = slices.read(int(slices.key[0]))[1].shape
    if crop > min(height, width):
        raise ConfigError(
            f'augment.crop={crop} is larger than the slices, which are {height}x{width}: lower it, '
            'or set it to 0 for whole slices'
        )


def count_steps(config: ConfigDict, slices: int, chunk: int = 1) -> int:
    """Updates of the run: `train.steps`, or the `train.epochs` over `slices`, in whole chunks.

    Raises ConfigError where that is none.
    """
    train = config.train
    passes = round(train.epochs * slices / train.batch_size)
    total = train.steps or -(-passes // chunk) * chunk
    if not total:
        raise ConfigError(
            f'train.epochs={train.epochs:g} over {slices} slices in batches of {train.batch_size} '
            'are 0 steps: raise it, or lower train.batch_size'
        )
    return total


def run_steps(
    config: ConfigDict,
    workdir: str,
    split: dict[str, volumes.Slices],
    *,
    keep_split: Callable[[], object],
    augment_fn: AugmentFn | None,
    loss_fn: LossFn | None,
    on_log: Callable,
    on_validation: Callable,
) -> None:
    """The loop: from the newest checkpoint, or from the first weights, to the last step.

    `keep_split` is called once nothing that was asked for can fail any more. Raises StoppedError
    behind a checkpoint where a signal asked to stop, and what `train_and_evaluate` raises.
    """
    batch_size, log_every = config.train.batch_size, config.train.log_every
    chunk = config.train.steps_per_call if config.data.cache == 'device' else 1  # updates a call
    total = count_steps(config, len(split['train']), chunk)
    validate_every = config.train.validate_every or max(total // 10 // chunk, 1) * chunk
    checkpoint_every = config.train.checkpoint_every or validate_every

    # Model, optimiser, state: restored, or new with pretrained weights.
    model, channels = models.create(**config.model), split['train'].channels
    tx, rate = optim.create(steps=total, **config.optim)
    state, progress, inputs, before = start_or_resume(
        config,
        model,
        tx,
        channels,
        workdir,
        lambda: volumes.joint_range(split['train'], [split['validation'], split['test']]),
    )
    hosts.check_same({'the first step': int(state.step), **to_dict(config)})
    intensity, how = weights.fixed_intensity(inputs), weights.measured_how(inputs)
    split = split | {name: volumes.measured(split[name], how) for name in ('train', 'validation')}
    teacher, distill = None, config.distill.to_dict()
    if where := distill.pop('teacher'):
        features = config.distill.pairwise > 0
        teacher, taught = transfer.load_teacher(
            where,
            model,
            inputs,
            features=features,
            class_names=config.model.class_names,
            context=config.data.context,
        )
        state = state.replace(teacher=taught)
    damaged = checkpoint.find_damaged(workdir, state.replace(teacher=None))
    changed = checkpoint.config_changes(before, to_dict(config)) if before else {}
    tell_changes(changed, int(state.step))
    if hosts.is_first():  # nothing that was asked for fails now
        checkpoint.set_aside(workdir, damaged)
        keep_split()
        keep_config(workdir, to_dict(config), int(state.step), before if changed else None)
    hosts.wait_for_all()
    first_step = int(state.step)

    # The step on all devices, the batches it eats, and what is written beside it.
    given = {'augment_fn': augment_fn, 'loss_fn': loss_fn}
    step_fn = bind_step(config, model, tx, **given, teacher=teacher, distill_options=distill)
    unread: dict[int, str] = {}
    placed, next_batch = loader(config, split['train'], step_fn, intensity, first_step, unread)
    predict = infer.compile_predict(model, size=config.data.size)
    interval = 1 if sys.stderr.isatty() else 60
    state = placed.put_state(state)
    pending, loss, waited, window = [], math.nan, 0.0, time.perf_counter()
    programs, step, logged, needed = {}, first_step, first_step, math.nan
    skipped = progress.get('skipped', 0)

    def read_pending() -> None:
        nonlocal loss, skipped
        last, skipped = read_metrics(
            pending, log, rate, log_every, skipped=skipped, max_skipped=config.train.max_skipped
        )
        loss = last or loss

    # Whatever ends the loop: closing waits for a checkpoint that is still being written, and
    # the curves are drawn behind it all, also of a run that diverged.
    with (
        contextlib.ExitStack() as end,
        faults.memory_explained(lambda: what_takes_memory(config, needed)),
        contextlib.closing(checkpoint.Writer(workdir)) as writer,
        contextlib.closing(
            MetricLog(workdir, first_step, on_log) if hosts.is_first() else Silent()
        ) as log,
        faults.signals() as asked_to_stop,
        tqdm(total=total, initial=first_step, unit='step', mininterval=interval) as bar,
    ):
        if hosts.is_first():
            end.callback(draw_curves, workdir)
        if changed:
            log.scalars(first_step, {'config_changes': len(changed)})
        end.callback(tell_unread, unread)
        while step < total:
            if 0 < config.train.patience <= progress['stale']:
                logger.info('no better Dice in %d validations: stopping', progress['stale'])
                break

            # Start these updates, then read those before: the device never waits for the host.
            stops = (total, *((step // n + 1) * n for n in (validate_every, checkpoint_every)))
            count, first = min(chunk, min(stops) - step), step + 1
            start = time.perf_counter()
            batch = placed.put_batch(next_batch(count))
            waited += time.perf_counter() - start
            if count not in programs:
                programs[count], facts = placed.compile(state, batch)
                logger.info(COMPILED, count, *facts.values())
                needed, waited, window, logged = facts['needed_mb'], 0.0, time.perf_counter(), step
            state, metrics = programs[count](state, batch)
            read_pending()
            pending, step = [(first, metrics)], step + count
            bar.update(count)
            if step // log_every > (step - count) // log_every:
                seconds = time.perf_counter() - window
                speed = {
                    'slices_per_second': (step - logged) * batch_size / seconds,
                    'data_wait': waited / seconds,
                }
                log.timings(step, speed)
                known = {} if math.isnan(loss) else {'loss': loss}
                bar.set_postfix(**known, data_wait=f'{speed["data_wait"]:.0%}')
                waited, window, logged = 0.0, time.perf_counter(), step

            # Validate on whole volumes, and keep the state with the Dice that ranks it.
            stop = asked_to_stop()
            if step % validate_every and step % checkpoint_every and step < total and not stop:
                continue
            read_pending()
            pending, dice, whole = [], None, placed.get_state(state)
            if len(split['validation']) and (step % validate_every == 0 or step == total):
                dice = validate_volumes(predict, whole, split['validation'], intensity, config, log)
                best = max(dice, progress['best_dice'] or -1.0)
                stale = 0 if progress['best_dice'] != best else progress['stale'] + 1
                progress = {'best_dice': best, 'stale': stale}
                logger.info('step %d: validation Dice %.4f, best %.4f', step, dice, best)
            progress = {**progress, 'skipped': skipped}
            log.flush()
            checkpoint.save(
                writer,
                step,
                whole,
                config=to_dict(config),
                progress=progress,
                inputs=inputs,
                dice=dice,
            )
            if dice is not None:
                on_validation(step, dice, whole)
            if stop:
                raise StoppedError(
                    f'{signal.Signals(stop).name}: stopped behind the checkpoint of step {step} of '
                    f'{total}; the same command goes on from there',
                    stop,
                )
            compilation.give_back_memory()
            waited, window, logged = 0.0, time.perf_counter(), step


NO_EFFECT = ('model.pretrained', 'model.stem', 'train.init_from')  # on a run that is resumed


def tell_changes(changed: dict[str, tuple[Any, Any]], step: int) -> None:
    """What a run that is resumed does otherwise than before."""
    idle = [key for key in changed if key in NO_EFFECT]
    listed = [f'{key} from {a!r} to {b!r}' for key, (a, b) in changed.items() if key not in idle]
    if listed:
        logger.warning('the config was changed, from step %d on: %s', step, '; '.join(listed))
    if idle:
        logger.warning(
            '%s changed, which has no effect on a run that is resumed: give another --workdir',
            ', '.join(idle),
        )


def keep_config(
    workdir: str, config: dict[str, Any], step: int, before: dict[str, Any] | None
) -> None:
    """WORKDIR/config.json, and of a changed one config_until_step_N.json as it was before."""
    kept = {'config.json': config} | ({f'config_until_step_{step}.json': before} if before else {})
    for name, tree in kept.items():
        with writing(Path(workdir) / name) as aside:
            aside.write_text(json.dumps(tree, indent=1) + '\n')


def what_takes_memory(config: ConfigDict, needed_mb: float) -> str:
    """What a step asks for, and the knobs that make it less."""
    train = config.train
    size = 'whole slices' if not config.augment.crop else f'crops of {config.augment.crop}'
    about = '' if math.isnan(needed_mb) else f' needs about {needed_mb:.0f} MB'
    return (
        f'a step of train.batch_size={train.batch_size} on {size}, train.accumulate='
        f"{train.accumulate}, train.remat='{train.remat}'{about}{faults.device_memory()}: "
        "raise accumulate, set remat='pointwise', or make batch_size or augment.crop smaller"
    )


def draw_curves(workdir: str) -> None:
    """The run's curves; a fault in writing them must not hide the one that ended it."""
    try:
        charts.write_curves(workdir)
    except DataError as error:
        logger.warning('%s', error)


def tell_unread(unread: dict[int, str]) -> None:
    """The slices that could not be read, at the end of the run."""
    if unread:
        logger.warning('%d slice(s) could not be read, others were used:', len(unread))
        for reason in unread.values():
            logger.warning('  %s', reason)


class _Callable(types.ModuleType):
    """This module, which is also the function `pspnet_jax.train`: one name cannot be both."""

    def __call__(self, *arguments, **options):
        from pspnet_jax import api  # which imports this module

        return api.train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
