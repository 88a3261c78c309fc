"""The training loop: data, updates, checkpoints, validation and logs; then the evaluation."""

import contextlib
import dataclasses
import functools
import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.config import to_dict, validate, with_absolute_paths
from pspnet_jax.data import pipeline, sources, splits, volumes
from pspnet_jax.evaluation import charts, visualize
from pspnet_jax.evaluation.protocol import evaluate_checkpoint
from pspnet_jax.evaluation.scores import evaluate_options, evaluate_volumes
from pspnet_jax.inference import infer
from pspnet_jax.models import weights
from pspnet_jax.runtime import checkpoint, compilation, faults, hosts, paths
from pspnet_jax.runtime.errors import ConfigError, DataError, NonFiniteLossError, StoppedError
from pspnet_jax.runtime.log import MetricLog, Silent
from pspnet_jax.training import losses
from pspnet_jax.training.placement import over_mesh, over_mesh_cached, under_pmap
from pspnet_jax.training.progress import (
    Pace,
    Progress,
    tell_config,
    tell_data,
    tell_network,
    tell_plan,
)
from pspnet_jax.training.start import Start, as_before, begin, complete, pretrained_file
from pspnet_jax.training.update import AugmentFn, LossFn, TrainState, bind_step

logger = logging.getLogger(__name__)


def read_metrics(
    pending: list[tuple[int, dict[str, jax.Array]]],
    loss: float,
    skipped: int,
    *,
    log: MetricLog | Silent,
    rate: Callable,
    config: ConfigDict,
) -> tuple[float, int]:
    """Wait for `pending` updates, log every `train.log_every`-th, and return (the last loss, the
    number of updates skipped so far).

    `loss` and `skipped` are the values before these updates. `pending` holds, for each call, the
    number of its first update and a vector of each metric. A skipped update is always logged, with
    None for NaN and infinity. Raises NonFiniteLossError if a NaN or infinite update is not skipped
    or more than `train.max_skipped` were.
    """
    train = config.train
    for first, metrics in pending:
        vectors = {name: np.asarray(vector).tolist() for name, vector in metrics.items()}
        was_skipped = vectors.pop('skipped', [0.0] * len(vectors['loss']))
        loss = vectors['loss'][-1]
        for i, skip in enumerate(was_skipped):
            step, values = first + i, {name: vector[i] for name, vector in vectors.items()}
            made = step - 1 - skipped  # the optimiser's count of updates before this one
            skipped += int(skip)
            sound = all(map(math.isfinite, values.values()))
            if (not sound and not skip) or skipped > train.max_skipped:
                raise NonFiniteLossError(not_finite(step, values, skipped, config))
            values = {n: v if math.isfinite(v) else None for n, v in values.items()}
            if skip:
                logger.warning(
                    'step %d: loss or gradient is NaN or infinite, the update is skipped '
                    '(%d of at most %d)', step, skipped, train.max_skipped,
                )  # fmt: skip
                values['skipped'] = skipped
            if skip or step % train.log_every == 0:
                log.scalars(step, {**values, 'learning_rate': float(rate(made))})
    return loss, skipped


def not_finite(step: int, values: dict[str, float], skipped: int, config: ConfigDict) -> str:
    """The error text: what happened and what to do; `skipped` counts such updates of the run."""
    train, found = config.train, [f'{n} {x}' for n, x in values.items() if not math.isfinite(x)]
    count, skip = '', 'skip such updates (--config.train.nan_policy=skip)'
    if train.nan_policy == 'skip':
        count = f', update {skipped} of this kind, of which train.max_skipped={train.max_skipped}'
        count += ' may be skipped'
        skip = f'allow more (--config.train.max_skipped={10 * (train.max_skipped or 1)})'
    lower = f'--config.optim.learning_rate={config.optim.learning_rate / 10:g}'
    return (
        f'step {step}: the loss or its gradient is NaN or infinite ({", ".join(found)}){count}. '
        f'Repeat the command with a lower learning rate ({lower}), which resumes from the last '
        f'checkpoint if there is one, or {skip}; python -m pspnet_jax.check finds faults in the '
        'data'
    )


def validate_volumes(
    predict, state: TrainState, slices: volumes.Slices, intensity, config, log
) -> float:
    """Mean Dice over the validation volumes, -1 if undefined; logs it with a few images."""
    params = state.params if state.ema_params is None else state.ema_params
    variables = {'params': params, 'batch_stats': state.batch_stats}
    pictures = []
    result = evaluate_volumes(
        functools.partial(predict, variables),
        volumes.iterate_volumes(volumes.select(slices, hosts.share(sorted(slices.intensity)))),
        order=sorted(slices.intensity),
        **evaluate_options(config, intensity),
        each=lambda volume, pred: pictures.append(
            visualize.volume_picture(volume, pred, config.model.class_names)
        ),
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
    """(placed, next_batch): the step on all devices, and a function of the batches from the one
    after `first_step` on.

    `next_batch(count)` gives `placed.put_batch` the batches of the next `count` updates. `count` is
    1 unless the slices are on the device, where a batch is their row numbers. `unread` collects the
    errors of skipped slices (data.bad_slices='skip').
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
        logger.info('the device holds all training images: %.0f MB', pipeline.megabytes(store))
        rows = pipeline.rows(drawn, **places)
        return over_mesh_cached(step_fn, store), lambda count: np.stack(
            [next(rows) for _ in range(count)]
        )
    batches = pipeline.batches(slices, drawn, threads=data.threads, **read, **places)
    placed = under_pmap(step_fn) if config.parallel == 'pmap' else over_mesh(step_fn)
    return placed, lambda count: next(batches)


def do_nothing(*_) -> None:
    """The default hook."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """The caller's functions: see `train_and_evaluate`."""

    augment_fn: AugmentFn | None = None
    loss_fn: LossFn | None = None
    on_log: Callable[[int, dict[str, float | None]], object] = do_nothing
    on_validation: Callable[[int, float, TrainState], object] = do_nothing


def train_and_evaluate(
    config: ConfigDict,
    workdir: str,
    *,
    augment_fn: AugmentFn | None = None,
    loss_fn: LossFn | None = None,
    on_log: Callable[[int, dict[str, float | None]], object] = do_nothing,
    on_validation: Callable[[int, float, TrainState], object] = do_nothing,
) -> dict[str, Any]:
    """Train, validate and checkpoint in `workdir`, resuming a stopped run; then evaluate.

    `augment_fn(key, image_HWC, mask_HW)` changes each example after the built-in augmentation; the
    channels of `data.context` are part of the image. `loss_fn(logits_BHWK, labels_BHW)` adds a term
    to the loss of the main output and (times loss.aux) of each auxiliary one. It sees the whole
    batch on any number of devices, and is the only loss with loss.cross_entropy=0 and loss.dice=0.
    For a loss with a weight in the config, add an entry to `losses.TERMS`.
    `on_log(step, values)` gets every record of metrics.jsonl. `on_validation(step, dice, state)`
    gets every validated state after its checkpoint was started; the next step reuses its arrays,
    so copy what you keep.

    Returns the evaluation of the test cases, or without any of the validation cases, as
    `evaluation.protocol.evaluate_checkpoint` does; {} if there are neither. Raises
    ConfigError, DataError, PretrainedError, CheckpointError, NonFiniteLossError.
    """
    validate(config)
    check_losses(config, own_loss=loss_fn is not None)
    config, workdir = with_absolute_paths(config), str(paths.writable(workdir, 'a folder'))
    tell_config(config, workdir)
    batch_size = config.train.batch_size
    if batch_size % jax.device_count():
        near = ' or '.join(map(str, hosts.nearest_batches(batch_size, jax.device_count())))
        raise ConfigError(
            f'train.batch_size {batch_size} is not a multiple of {jax.device_count()} devices: '
            f'set it to {near}'
        )

    if config.parallel == 'pmap' and batch_size // jax.device_count() % config.train.accumulate:
        raise ConfigError(
            f"with parallel='pmap', each device gets {batch_size // jax.device_count()} slices of "
            f'train.batch_size={batch_size}, which is not a multiple of '
            f'train.accumulate={config.train.accumulate}: change one'
        )

    # A new run downloads its initial weights before it reads the data, which can take minutes;
    # missing data is still reported first, below.
    source = config.data.source
    if not checkpoint.steps(workdir) and (not source or Path(source).expanduser().exists()):
        pretrained_file(config)

    # Read the data and fill in what the config leaves open. It is stored with the run, so that the
    # numbers of the classes stay the same in every file.
    config = as_before(config, workdir)
    slices, parts = sources.load(config)
    paths.remember(sources.places(config))
    config = complete(config, slices, int(np.isin(slices.patient, parts['train']).sum()))
    split = {name: volumes.select(slices, patients) for name, patients in parts.items()}
    if config.data.size:  # validation and test slices keep their own size
        split['train'] = volumes.resized(
            split['train'], config.data.size, config.data.fit, config.loss.ignore_label
        )
    check_augment(config.augment, split['train'])
    if config.data.cache == 'memory':
        for name in ('train', 'validation'):  # each takes at most half, so both fit
            split[name] = volumes.in_memory(split[name])
    tell_data(split)

    with faults.locked(workdir) if hosts.is_first() else contextlib.nullcontext():
        run_steps(
            config,
            workdir,
            split,
            Hooks(augment_fn, loss_fn, on_log, on_validation),
            keep_split=lambda: splits.keep(Path(workdir) / splits.KEPT, parts, slices),
        )
        if not parts['test'] and not parts['validation']:
            logger.info('nothing is evaluated: there are no test or validation cases')
            return {}
        part = 'test' if parts['test'] else 'validation'
        logger.info('evaluating the %s cases (%d)', part, len(parts[part]))
        return evaluate_checkpoint(workdir, split=part, trusted=True, loaded=(slices, parts))


def check_losses(config: ConfigDict, own_loss: bool) -> None:
    """Raise ConfigError if all losses have weight 0 and the caller adds none (`own_loss`), or if a
    weight names a loss that is not in `losses.TERMS`.
    """
    loss, distill = config.loss.to_dict(), config.distill
    taught = bool(distill.teacher and (distill.weight or distill.pairwise))
    terms, extra = [name for name in losses.TERMS if name in loss], loss['extra'] or {}
    if not any((*extra.values(), *(loss[name] for name in terms), taught, own_loss)):
        weights = ', '.join(f'loss.{name}' for name in terms)
        raise ConfigError(f'{weights} are all 0: give one a weight, such as --config.loss.dice=1')
    if unknown := sorted(extra.keys() - losses.TERMS.keys()):
        raise ConfigError(
            f'loss.extra gives a weight to {", ".join(unknown)}, which is not in losses.TERMS: add '
            f"it before training, as in losses.TERMS['{unknown[0]}'] = (function, {{}})"
        )


def check_augment(augment: ConfigDict, slices: volumes.Slices) -> None:
    """Raise ConfigError for a crop larger than the slices, which all have one size, and for a
    channel that they lack.
    """
    if not len(slices):
        raise ConfigError(
            'no training cases are left: lower --config.data.test_fraction or '
            '--config.data.validation_fraction, or add cases'
        )
    height, width, channels = slices.read(int(slices.key[0]))[0].shape
    if augment.crop > min(height, width):
        raise ConfigError(
            f'augment.crop={augment.crop} is larger than the slices, which are {height}x{width}: '
            'lower it, or set it to 0 for whole slices'
        )
    kept = augment.kept_channel
    if augment.channel_dropout and kept is not None and kept >= channels:
        raise ConfigError(
            f'augment.kept_channel={kept} is not a channel of the images, which have {channels}, '
            'numbered from 0: give one of these, or None'
        )


def schedule(config: ConfigDict, slices: int) -> tuple[int, int, int, int]:
    """Numbers of updates: (of the run, of a call, between validations, between checkpoints).

    The run has `train.steps` updates, or `train.epochs` over `slices`, rounded up to whole calls.
    Raises ConfigError if that is 0.
    """
    train = config.train
    chunk = train.steps_per_call if config.data.cache == 'device' else 1
    passes = round(train.epochs * slices / train.batch_size)
    total = train.steps or -(-passes // chunk) * chunk
    if not total:
        raise ConfigError(
            f'train.epochs={train.epochs:g} over {slices} slices in batches of {train.batch_size} '
            'are 0 steps: raise --config.train.epochs, or lower --config.train.batch_size'
        )
    validate_every = train.validate_every or max(total // 10 // chunk, 1) * chunk
    return total, chunk, validate_every, train.checkpoint_every or validate_every


@dataclasses.dataclass
class Window:
    """Updates since speed was last logged; compiling, validating and saving start a new window."""

    step: int  # before the first of them
    waited: float = 0.0  # seconds, for data
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def speed(self, step: int, batch_size: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        return {
            'slices_per_second': (step - self.step) * batch_size / seconds,
            'data_wait': self.waited / seconds,
        }


def bind_hooks(config: ConfigDict, begun: Start, hooks: Hooks) -> Callable:
    """`update.train_step` of the config, with the caller's functions."""
    ours = {'augment_fn': hooks.augment_fn, 'loss_fn': hooks.loss_fn, 'teacher': begun.teacher}
    return bind_step(config, begun.model, begun.tx, **ours)


def compiled(
    config: ConfigDict, size: int, placed, state: TrainState, batch, *, first: bool
) -> tuple[Any, float]:
    """The step for such a batch, and the MB it needs; the first one of a run is logged."""
    if first:
        logger.info('compiling the training step')
    program, facts = placed.compile(state, batch)
    if first:
        tell_network(config, size, facts['seconds'])
    return program, facts['needed_mb']


def run_steps(
    config: ConfigDict,
    workdir: str,
    split: dict[str, volumes.Slices],
    hooks: Hooks,
    *,
    keep_split: Callable[[], object],
) -> None:
    """The loop, from the newest checkpoint or the initial weights to the last step.

    Raises what `train_and_evaluate` does, and StoppedError if a signal asked to stop.
    """
    train = config.train
    total, chunk, validate_every, checkpoint_every = schedule(config, len(split['train']))
    begun, state, progress = begin(config, workdir, split, total, keep_split)
    inputs, step = begun.inputs, int(state.step)
    intensity, how = weights.fixed_intensity(inputs), weights.measured_how(inputs)
    split = split | {name: volumes.measured(split[name], how) for name in ('train', 'validation')}

    # The step on all devices, its batches, and the loop's variables.
    step_fn, unread = bind_hooks(config, begun, hooks), {}
    placed, next_batch = loader(config, split['train'], step_fn, intensity, step, unread)
    predict = infer.compile_predict(begun.model, size=config.data.size, fit=config.data.fit)
    state, programs, needed = placed.put_state(state), {}, math.nan
    tell_plan(config, len(split['train']), total, validate_every)
    pending, loss, skipped = [], math.nan, progress.get('skipped', 0)

    # However the loop ends, the last checkpoint is written, and then the curves are drawn.
    with (
        contextlib.ExitStack() as end,
        faults.memory_explained(lambda: what_takes_memory(config, needed)),
        contextlib.closing(checkpoint.Writer(workdir)) as writer,
        contextlib.closing(open_log(workdir, step, hooks.on_log, begun.changed)) as log,
        faults.signals() as asked_to_stop,
        Progress(Pace(total, validate_every, step), train.batch_size) as shown,
    ):
        read = functools.partial(read_metrics, log=log, rate=begun.rate, config=config)
        save = functools.partial(checkpoint.save, writer, config=to_dict(config), inputs=inputs)
        end.callback(draw_curves, workdir)
        end.callback(warn_of_unread, unread)
        window = Window(step)
        while step < total and not out_of_patience(config, progress):
            # Start these updates, then read the previous ones: the device never waits for the host.
            stops = (total, *((step // n + 1) * n for n in (validate_every, checkpoint_every)))
            count, first, start = min(chunk, min(stops) - step), step + 1, time.perf_counter()
            batch = placed.put_batch(next_batch(count))
            window.waited += time.perf_counter() - start
            if count not in programs:
                given = config, begun.size, placed, state, batch
                programs[count], needed = compiled(*given, first=not programs)
                window = Window(step)
                shown.pace.skip(step)
            state, metrics = programs[count](state, batch)
            loss, skipped = read(pending, loss, skipped)
            pending, step = [(first, metrics)], step + count
            shown.update(first - 1, loss)
            if step // train.log_every > (step - count) // train.log_every:
                log.timings(step, window.speed(step, train.batch_size))
                window = Window(step)

            # Validate on whole volumes, and save the state with the Dice that ranks it.
            stop, validates = asked_to_stop(), step % validate_every == 0 or step == total
            if not (validates or step % checkpoint_every == 0 or stop):
                continue
            loss, skipped = read(pending, loss, skipped)
            shown.update(step, loss)
            pending, dice, whole = [], None, placed.get_state(state)
            if validates and len(split['validation']):
                dice = validate_volumes(predict, whole, split['validation'], intensity, config, log)
                progress = ranked(progress, dice, step)
                shown.tell_validation(step, dice, progress)
            log.flush()
            save(step, whole, progress={**progress, 'skipped': skipped}, dice=dice)
            if dice is not None:
                hooks.on_validation(step, dice, whole)
            if stop:
                raise stopped(stop, step, total)
            compilation.trim_heap()
            window = Window(step)
            shown.pace.skip(step)


def open_log(workdir: str, step: int, on_log: Callable, changed: Mapping) -> MetricLog | Silent:
    """The log from `step` on, with the number of knobs that were `changed` since the checkpoint."""
    log = MetricLog(workdir, step, on_log) if hosts.is_first() else Silent()
    if changed:
        log.scalars(step, {'config_changes': len(changed)})
    return log


def ranked(progress: dict[str, Any], dice: float, step: int) -> dict[str, Any]:
    """`progress` with the best validation Dice, its step, and how many since were no better."""
    best = progress['best_dice']
    if best is None or dice > best:
        return {**progress, 'best_dice': dice, 'best_step': step, 'stale': 0}
    newest = {'best_step': step} if dice == best else {}  # the newest, as in `checkpoint.best`
    return {**progress, **newest, 'stale': progress['stale'] + 1}


def out_of_patience(config: ConfigDict, progress: dict[str, Any]) -> bool:
    """Whether `train.patience` validations in a row were no better; logs it."""
    if not 0 < config.train.patience <= progress['stale']:
        return False
    logger.info(
        'stopping early: the last %d validations were no better (train.patience)', progress['stale']
    )
    return True


def stopped(number: int, step: int, total: int) -> StoppedError:
    """The error of a run that a signal asked to stop."""
    return StoppedError(
        f'{signal.Signals(number).name}: stopped after the checkpoint of step {step} of {total}; '
        'the same command resumes from there',
        number,
    )


def what_takes_memory(config: ConfigDict, needed_mb: float) -> str:
    """What memory a step needs, and the options that reduce it."""
    train = config.train
    size = 'whole slices' if not config.augment.crop else f'crops of {config.augment.crop}'
    about = '' if math.isnan(needed_mb) else f' needs about {needed_mb:.0f} MB'
    return (
        f'a step of train.batch_size={train.batch_size} on {size}, train.accumulate='
        f"{train.accumulate}, train.remat='{train.remat}'{about}{faults.device_memory()}: "
        f'raise --config.train.accumulate, set --config.train.remat=pointwise, or lower '
        '--config.train.batch_size or --config.augment.crop'
    )


def draw_curves(workdir: str) -> None:
    """Draw the run's curves; an error here must not hide the one that ended the run."""
    try:
        if hosts.is_first():
            charts.write_curves(workdir)
    except DataError as error:
        logger.warning('%s', error)


def warn_of_unread(unread: dict[int, str]) -> None:
    """Log the slices that could not be read, at the end of the run."""
    if unread:
        logger.warning('%d slice(s) could not be read and were replaced by others:', len(unread))
        for reason in unread.values():
            logger.warning('  %s', reason)
