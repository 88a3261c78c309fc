"""The training step and the loop around it.

`train_step` is a pure function of state and batch. `over_mesh` jits it over all
devices, `under_pmap` maps it; both give the same numbers (tests/test_parallel.py).
"""

import collections
import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from pspnet_jax import checkpoint, infer, losses, models, optim, visualize
from pspnet_jax.config import to_dict, validate
from pspnet_jax.data import pipeline, sources, volumes
from pspnet_jax.data.augment import augment
from pspnet_jax.errors import ConfigError, NonFiniteLossError
from pspnet_jax.evaluate import evaluate_checkpoint, evaluate_options, evaluate_volumes
from pspnet_jax.log import MetricLog
from pspnet_jax.models import pretrained, published
from pspnet_jax.models.layers import global_indices


@flax.struct.dataclass
class TrainState:
    """All that a step changes. `ema_params` is None where no average is kept."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any


def create_state(model: nn.Module, tx, *, seed: int, channels: int, ema: bool) -> TrainState:
    """Random parameters from `seed` for images of `channels` channels."""
    image = jnp.zeros((1, 64, 64, channels), jnp.float32)  # no parameter depends on the size
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(seed), image)
    params = variables['params']
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get('batch_stats', {}),
        opt_state=tx.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
    )


def segmentation_loss(
    out: dict[str, jax.Array],
    labels_BHW: jax.Array,
    *,
    cross_entropy: float,
    dice: float,
    aux: float,
    class_weights: tuple[float, ...],
    ignore_label: int,
    axis_name: str | None,
) -> jax.Array:
    """cross_entropy * CE + dice * soft Dice, and `aux` times the same for every other output.

    Logits at 1/s of the labels' size meet every s-th label: labels are never resized.
    """

    def one_head(logits_BhwK):
        (H, W), (h, w) = labels_BHW.shape[1:], logits_BhwK.shape[1:3]
        labels_Bhw = labels_BHW[:, :: H // h, :: W // w]
        options = {'ignore_label': ignore_label, 'axis_name': axis_name}
        total = 0.0
        if cross_entropy:
            total += cross_entropy * losses.cross_entropy(
                logits_BhwK, labels_Bhw, class_weights=class_weights, **options
            )
        if dice:
            total += dice * losses.soft_dice(logits_BhwK, labels_Bhw, **options)
        return total

    total = one_head(out['logits'])
    if aux:
        total += aux * sum(one_head(x) for name, x in out.items() if name != 'logits')
    return total


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
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from {'image': B H W C, 'mask': B H W}; metrics: loss, gradient_norm.

    Randomness is a function of seed, step and the example's place in the global batch.
    With `accumulate` = k the gradient is the mean over k micro-batches, every k-th
    example each, in one compiled loop; BatchNorm then sees B/k images at a time.
    """
    if axis_name is not None:
        model = models.over_axis(model, axis_name)  # BatchNorm and dropout over all devices
    augment_key, dropout_key = jax.random.split(
        jax.random.fold_in(jax.random.key(seed), state.step)
    )
    index_B = global_indices(batch['image'].shape[0], axis_name)
    keys_B = jax.vmap(lambda i: jax.random.fold_in(augment_key, i))(index_B)
    image, mask = jax.vmap(functools.partial(augment, **augment_options))(
        keys_B, batch['image'], batch['mask']
    )

    def loss_fn(params, batch_stats, image, mask, key):
        out, updates = model.apply(
            {'params': params, 'batch_stats': batch_stats},
            image,
            train=True,
            rngs={'dropout': key},
            mutable=['batch_stats'],
        )
        loss = segmentation_loss(out, mask, axis_name=axis_name, **loss_options)
        return loss, updates.get('batch_stats', {})

    def micro_step(carry, micro):
        batch_stats, i = carry
        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch_stats, *micro, jax.random.fold_in(dropout_key, i)
        )
        return (batch_stats, i + 1), (loss, grads)

    if accumulate == 1:
        (batch_stats, _), (loss, grads) = micro_step((state.batch_stats, 0), (image, mask))
    else:
        # B -> k B/k by stride, so that each device keeps its own examples.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), (image, mask)
        )
        (batch_stats, _), stacked = jax.lax.scan(micro_step, (state.batch_stats, 0), micro)
        loss, grads = jax.tree.map(lambda x: x.mean(axis=0), stacked)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1.0 - ema_decay)
    metrics = {'loss': loss, 'gradient_norm': optax.tree.norm(grads)}
    state = TrainState(state.step + 1, params, batch_stats, opt_state, ema_params)
    return state, metrics


class Placed(NamedTuple):
    """A step on devices: `step(state, batch)`, and how state and batch get there and back."""

    step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    put_state: Callable[[Any], Any]
    put_batch: Callable[[Any], Any]
    get_state: Callable[[Any], Any]


def over_mesh(step: Callable) -> Placed:
    """`step` jitted over a one-axis mesh: batch split, state on every device and donated."""
    mesh = jax.make_mesh((jax.device_count(),), ('data',), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
    return Placed(
        jax.jit(step, donate_argnums=0, in_shardings=(whole, split), out_shardings=(whole, whole)),
        put_state=lambda state: jax.device_put(state, whole),
        put_batch=lambda batch: jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(split, x), batch
        ),
        get_state=lambda state: state,
    )


def under_pmap(step: Callable) -> Placed:
    """`step(..., axis_name='data')` under `jax.pmap`: a copy of the state per device, donated."""
    n = jax.local_device_count()
    mapped = jax.pmap(functools.partial(step, axis_name='data'), axis_name='data', donate_argnums=0)

    def first(tree):
        return jax.tree.map(lambda x: x[0], tree)

    def run(state, batch):
        state, metrics = mapped(state, batch)
        return state, first(metrics)

    return Placed(
        run,
        put_state=lambda state: jax.tree.map(lambda x: jnp.stack([x] * n), state),
        put_batch=lambda batch: jax.tree.map(
            lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch
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


def step_flops(step: Callable, state: TrainState, batch_shape: tuple[int, ...]) -> float:
    """Floating-point operations of one step on B H W C, as XLA counts them; NaN if it can't."""
    batch = {
        'image': jax.ShapeDtypeStruct(batch_shape, jnp.float32),
        'mask': jax.ShapeDtypeStruct(batch_shape[:3], jnp.int32),
    }
    cost = jax.jit(step).lower(jax.eval_shape(lambda: state), batch).cost_analysis() or {}
    return cost.get('flops', float('nan'))


def read_metrics(
    pending: list[tuple[int, dict[str, jax.Array]]], log: MetricLog, rate, every: int
) -> float:
    """Wait for these steps, log each `every`-th, return the last loss (0 of no steps).

    Raises NonFiniteLossError at a step whose loss or gradient is not finite.
    """
    loss = 0.0
    for step, metrics in pending:
        values = {name: float(value) for name, value in metrics.items()}
        loss = values['loss']
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteLossError(
                f'step {step}: {values}. Nothing after the last checkpoint was kept. Look at the '
                'learning rate (optim.learning_rate, optim.warmup_steps), optim.clip_norm, the '
                'class weights, and at the data (python -m pspnet_jax.data.lgg checks it)'
            )
        if step % every == 0:
            log.scalars(step, {**values, 'learning_rate': float(rate(step - 1))})
    return loss


def normalize_by_weights(config: ConfigDict) -> bool:
    """Whether images are normalised as the pretrained weights were fed, not by volume."""
    own_choice = 'weights' if config.model.pretrained else 'volume'
    return (config.data.normalize or own_choice) == 'weights'


def start_or_resume(config: ConfigDict, model, tx, channels: int, workdir: str):
    """(state, progress, inputs): from the newest sound checkpoint, else new, pretrained if
    asked for. `inputs` is what the network takes, `checkpoint.save`'s.
    """
    ema = config.train.ema_decay > 0
    state = create_state(model, tx, seed=config.seed, channels=channels, ema=ema)
    logging.info('parameters:\n%s', parameter_table(state.params))
    restored = checkpoint.restore(workdir, state, to_dict(config))
    if restored:
        state, meta = restored
        logging.info('going on from step %d', state.step)
        return state, meta['progress'], meta['inputs']
    normalization = published.IMAGENET
    by_weights = normalize_by_weights(config)
    if config.model.pretrained:
        variables, normalization, report = pretrained.load_backbone(
            {'params': state.params, 'batch_stats': state.batch_stats},
            config.model.pretrained,
            stem=config.model.stem,
            unit_deviation=not by_weights,
            options=config.model,
        )
        logging.info(report)
        params = variables['params']
        # A copy of the average: the step donates both, and a buffer can be donated once.
        average = jax.tree.map(jnp.copy, params) if ema else None
        state = state.replace(
            params=params, ema_params=average, batch_stats=variables.get('batch_stats', {})
        )
    logging.info(
        'images are normalised %s',
        f'as the weights were trained: {normalization}' if by_weights else 'volume by volume',
    )
    inputs = {
        'channels': channels,
        'normalization': normalization._asdict() if by_weights else None,
    }
    return state, {'best_dice': None, 'stale': 0}, inputs


def validate_volumes(
    predict, state: TrainState, slices: volumes.Slices, intensity, config, log
) -> float:
    """Mean Dice over the validation volumes; logs it with a few pictures."""
    params = state.params if state.ema_params is None else state.ema_params
    variables = {'params': params, 'batch_stats': state.batch_stats}
    pictures = []
    result = evaluate_volumes(
        functools.partial(predict, variables),
        volumes.iterate_volumes(slices),
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


def train_and_evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Train, validate and checkpoint in `workdir`, going on where it stopped; then evaluate.

    Returns the evaluation of the test patients, `evaluate.evaluate_checkpoint`'s. Raises
    ConfigError, DataError, PretrainedError, CheckpointError, NonFiniteLossError.
    """
    validate(config)
    logging.info('config:\n%s', config)
    batch_size = config.train.batch_size
    if batch_size % jax.device_count():
        raise ConfigError(
            f'train.batch_size {batch_size} does not divide over {jax.device_count()} devices'
        )

    # Data: which patients, and how many of their slices hold a lesion.
    slices, parts = sources.load(config)
    split = {name: volumes.select(slices, patients) for name, patients in parts.items()}
    for name, part in split.items():
        logging.info('%s: %s', name, volumes.describe(part))
    total = config.train.steps or round(config.train.epochs * len(split['train']) / batch_size)
    validate_every = config.train.validate_every or max(total // 10, 1)
    checkpoint_every = config.train.checkpoint_every or validate_every
    log_every = config.train.log_every

    # Model, optimiser, state: restored, or new with pretrained weights.
    model = models.create(**config.model)
    tx, rate = optim.create(steps=total, **config.optim)
    state, progress, inputs = start_or_resume(config, model, tx, slices.channels, workdir)
    intensity = published.fixed_intensity(inputs)
    first_step = int(state.step)

    # The step on all devices, the batches it eats, and what is written beside it.
    step_fn = functools.partial(
        train_step,
        model=model,
        tx=tx,
        loss_options=config.loss.to_dict(),
        augment_options=config.augment.to_dict(),
        seed=config.seed,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema_decay,
    )
    placed = under_pmap(step_fn) if config.parallel == 'pmap' else over_mesh(step_fn)
    batches = pipeline.batches(
        split['train'],
        batch_size=batch_size,
        first_step=first_step,
        seed=config.seed,
        sampling=config.data.sampling,
        lesion_floor=config.data.lesion_floor,
        intensity=intensity,
        threads=config.data.threads,
        shard=(jax.process_index(), jax.process_count()),
    )
    batch_shape = (batch_size, *slices.read(int(slices.key[0]))[0].shape)
    logging.info('%.1f GFLOP a step', step_flops(step_fn, state, batch_shape) / 1e9)
    predict = infer.compile_predict(model)
    interval = 1 if sys.stderr.isatty() else 60
    state = placed.put_state(state)
    pending, loss, waited, window = [], math.nan, 0.0, time.perf_counter()

    # Closing waits for a checkpoint that is still being written, whatever ends the loop.
    with (
        contextlib.closing(checkpoint.open_writer(workdir)) as writer,
        contextlib.closing(MetricLog(workdir, first_step)) as log,
        tqdm(total=total, initial=first_step, unit='step', mininterval=interval) as bar,
    ):
        for step in range(first_step + 1, total + 1):
            if 0 < config.train.patience <= progress['stale']:
                logging.info('no better Dice in %d validations: stopping', progress['stale'])
                break

            # Start this step, then read the one before: the device never waits for the host.
            start = time.perf_counter()
            batch = placed.put_batch(next(batches))
            waited += time.perf_counter() - start
            state, metrics = placed.step(state, batch)
            loss = read_metrics(pending, log, rate, log_every) or loss
            pending = [(step, metrics)]
            bar.update()
            if step % log_every == 0:
                seconds = time.perf_counter() - window
                speed = {
                    'slices_per_second': log_every * batch_size / seconds,
                    'data_wait': waited / seconds,
                }
                log.timings(step, speed)
                bar.set_postfix(loss=loss, data_wait=f'{speed["data_wait"]:.0%}')
                waited, window = 0.0, time.perf_counter()

            # Validate on whole volumes, and keep the state with the Dice that ranks it.
            if step % validate_every and step % checkpoint_every and step < total:
                continue
            read_metrics(pending, log, rate, log_every)
            pending, dice, whole = [], None, placed.get_state(state)
            if len(split['validation']) and (step % validate_every == 0 or step == total):
                dice = validate_volumes(predict, whole, split['validation'], intensity, config, log)
                best = max(dice, progress['best_dice'] or -1.0)
                stale = 0 if progress['best_dice'] != best else progress['stale'] + 1
                progress = {'best_dice': best, 'stale': stale}
                logging.info('step %d: validation Dice %.4f, best %.4f', step, dice, best)
            checkpoint.save(
                writer,
                step,
                whole,
                config=to_dict(config),
                progress=progress,
                inputs=inputs,
                dice=dice,
            )
            waited, window = 0.0, time.perf_counter()

    return evaluate_checkpoint(workdir, split='test' if parts['test'] else 'validation')
