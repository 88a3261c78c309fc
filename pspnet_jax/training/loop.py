"""The loop around the update: data, checkpoints, validation, logs; then the evaluation."""

import contextlib
import dataclasses
import functools
import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

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
from pspnet_jax.training.start import begin, name_classes, pretrained_file, stored_class_names
from pspnet_jax.training.update import AugmentFn, LossFn, TrainState, bind_step

logger = logging.getLogger(__name__)
COMPILED = (
    'program of %d update(s): compiled in %.1f s, %.1f GFLOP, %.0f MB of temporaries, %.0f in all'
)


def read_metrics(
    pending: list[tuple[int, dict[str, jax.Array]]],
    loss: float,
    skipped: int,
    *,
    log: MetricLog | Silent,
    rate: Callable,
    train: ConfigDict,
) -> tuple[float, int]:
    """Wait for `pending` updates, log every `train.log_every`-th, and return (the last loss, the
    number of updates skipped so far).

    `loss` and `skipped` are those before these updates. `pending` holds the number of the first
    update of each call and a vector of each metric. A skipped update is always logged, with None
    for NaN and infinity. Raises
    NonFiniteLossError where one is not skipped, and where more than `train.max_skipped` were.
    """
    for first, metrics in pending:
        vectors = {name: np.asarray(vector).tolist() for name, vector in metrics.items()}
        was_skipped = vectors.pop('skipped', [0.0] * len(vectors['loss']))
        loss = vectors['loss'][-1]
        for i, skip in enumerate(was_skipped):
            step, values = first + i, {name: vector[i] for name, vector in vectors.items()}
            made = step - 1 - skipped  # updates before it, which the optimiser counts
            skipped += int(skip)
            sound = all(map(math.isfinite, values.values()))
            if (not sound and not skip) or skipped > train.max_skipped:
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
            if skip or step % train.log_every == 0:
                log.scalars(step, {**values, 'learning_rate': float(rate(made))})
    return loss, skipped


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
        **evaluate_options(config, intensity),
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


def do_nothing(*_) -> None:
    """What a hook does where none was given."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a caller adds to a run: see `train_and_evaluate`."""

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
    `evaluation.protocol.evaluate_checkpoint` does; {} where there are neither. Raises
    ConfigError, DataError, PretrainedError, CheckpointError, NonFiniteLossError.
    """
    validate(config)
    check_losses(config, own_loss=loss_fn is not None)
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

    with faults.locked(workdir) if hosts.is_first() else contextlib.nullcontext():
        run_steps(
            config,
            workdir,
            split,
            Hooks(augment_fn, loss_fn, on_log, on_validation),
            keep_split=lambda: splits.keep(Path(workdir) / splits.KEPT, parts, slices),
        )
        if not parts['test'] and not parts['validation']:
            logger.info('there is no test or validation case: nothing is evaluated')
            return {}
        part = 'test' if parts['test'] else 'validation'
        return evaluate_checkpoint(workdir, split=part, trusted=True, loaded=(slices, parts))


def check_losses(config: ConfigDict, own_loss: bool) -> None:
    """Raise ConfigError where nothing would be minimised, unless there is a loss of the caller's,
    and for a weight of a loss that nobody has added to `losses.TERMS`.
    """
    loss, distill = config.loss.to_dict(), config.distill
    taught = bool(distill.teacher and (distill.weight or distill.pairwise))
    terms, extra = [name for name in losses.TERMS if name in loss], loss['extra'] or {}
    if not any((*extra.values(), *(loss[name] for name in terms), taught, own_loss)):
        weights = ', '.join(f'loss.{name}' for name in terms)
        raise ConfigError(f'{weights} are all 0: give one a weight, such as --config.loss.dice=1')
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


def schedule(config: ConfigDict, slices: int) -> tuple[int, int, int, int]:
    """(updates of the run, of a call, between validations, between checkpoints).

    The run's are `train.steps`, or the `train.epochs` over `slices` in whole calls. Raises
    ConfigError where that is none.
    """
    train = config.train
    chunk = train.steps_per_call if config.data.cache == 'device' else 1
    passes = round(train.epochs * slices / train.batch_size)
    total = train.steps or -(-passes // chunk) * chunk
    if not total:
        raise ConfigError(
            f'train.epochs={train.epochs:g} over {slices} slices in batches of {train.batch_size} '
            'are 0 steps: raise it, or lower train.batch_size'
        )
    validate_every = train.validate_every or max(total // 10 // chunk, 1) * chunk
    return total, chunk, validate_every, train.checkpoint_every or validate_every


@dataclasses.dataclass
class Window:
    """Updates since speed was last told; compiling, validating and saving begin a new one."""

    step: int  # before the first of them
    waited: float = 0.0  # seconds, for data
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def speed(self, step: int, batch_size: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        return {
            'slices_per_second': (step - self.step) * batch_size / seconds,
            'data_wait': self.waited / seconds,
        }


def run_steps(
    config: ConfigDict,
    workdir: str,
    split: dict[str, volumes.Slices],
    hooks: Hooks,
    *,
    keep_split: Callable[[], object],
) -> None:
    """The loop: from the newest checkpoint, or from the first weights, to the last step.

    Raises what `train_and_evaluate` does, and StoppedError where a signal asked to stop.
    """
    train = config.train
    total, chunk, validate_every, checkpoint_every = schedule(config, len(split['train']))
    begun, state, progress = begin(config, workdir, split, total, keep_split)
    inputs, step = begun.inputs, int(state.step)
    intensity, how = weights.fixed_intensity(inputs), weights.measured_how(inputs)
    split = split | {name: volumes.measured(split[name], how) for name in ('train', 'validation')}

    # The step on all devices, the batches it eats, and what the loop carries.
    given = {'augment_fn': hooks.augment_fn, 'loss_fn': hooks.loss_fn, 'teacher': begun.teacher}
    step_fn, unread = bind_step(config, begun.model, begun.tx, **given), {}
    placed, next_batch = loader(config, split['train'], step_fn, intensity, step, unread)
    predict = infer.compile_predict(begun.model, size=config.data.size)
    state, programs, needed = placed.put_state(state), {}, math.nan
    pending, loss, skipped = [], math.nan, progress.get('skipped', 0)

    # Whatever ends the loop: closing waits for a checkpoint that is still being written, and
    # the curves are drawn behind it all, also of a run that diverged.
    with (
        contextlib.ExitStack() as end,
        faults.memory_explained(lambda: what_takes_memory(config, needed)),
        contextlib.closing(checkpoint.Writer(workdir)) as writer,
        contextlib.closing(open_log(workdir, step, hooks.on_log)) as log,
        faults.signals() as asked_to_stop,
        progress_bar(step, total) as bar,
    ):
        read = functools.partial(read_metrics, log=log, rate=begun.rate, train=train)
        save = functools.partial(checkpoint.save, writer, config=to_dict(config), inputs=inputs)
        end.callback(draw_curves, workdir)
        if begun.changed:
            log.scalars(step, {'config_changes': len(begun.changed)})
        end.callback(warn_of_unread, unread)
        window = Window(step)
        while step < total and not out_of_patience(config, progress):
            # Start these updates, then read those before: the device never waits for the host.
            stops = (total, *((step // n + 1) * n for n in (validate_every, checkpoint_every)))
            count, first, start = min(chunk, min(stops) - step), step + 1, time.perf_counter()
            batch = placed.put_batch(next_batch(count))
            window.waited += time.perf_counter() - start
            if count not in programs:
                programs[count], facts = placed.compile(state, batch)
                logger.info(COMPILED, count, *facts.values())
                needed, window = facts['needed_mb'], Window(step)
            state, metrics = programs[count](state, batch)
            loss, skipped = read(pending, loss, skipped)
            pending, step = [(first, metrics)], step + count
            bar.update(count)
            if step // train.log_every > (step - count) // train.log_every:
                tell_speed(window.speed(step, train.batch_size), step, loss, log, bar)
                window = Window(step)

            # Validate on whole volumes, and keep the state with the Dice that ranks it.
            stop, validates = asked_to_stop(), step % validate_every == 0 or step == total
            if not (validates or step % checkpoint_every == 0 or stop):
                continue
            loss, skipped = read(pending, loss, skipped)
            pending, dice, whole = [], None, placed.get_state(state)
            if validates and len(split['validation']):
                dice = validate_volumes(predict, whole, split['validation'], intensity, config, log)
                progress = ranked(progress, dice, step)
            progress = {**progress, 'skipped': skipped}
            log.flush()
            save(step, whole, progress=progress, dice=dice)
            if dice is not None:
                hooks.on_validation(step, dice, whole)
            if stop:
                raise stopped(stop, step, total)
            compilation.trim_heap()
            window = Window(step)


def open_log(workdir: str, first_step: int, on_log: Callable) -> MetricLog | Silent:
    return MetricLog(workdir, first_step, on_log) if hosts.is_first() else Silent()


def progress_bar(first_step: int, total: int) -> tqdm:
    interval = 1 if sys.stderr.isatty() else 60  # seconds
    return tqdm(total=total, initial=first_step, unit='step', mininterval=interval)


def tell_speed(
    speed: dict[str, float], step: int, loss: float, log: MetricLog | Silent, bar: tqdm
) -> None:
    """To TensorBoard, and beside the bar with the last loss."""
    log.timings(step, speed)
    known = {} if math.isnan(loss) else {'loss': loss}
    bar.set_postfix(**known, data_wait=f'{speed["data_wait"]:.0%}')


def ranked(progress: dict[str, Any], dice: float, step: int) -> dict[str, Any]:
    """The best Dice of the run's validations, and how many were no better since."""
    best = max(dice, progress['best_dice'] or -1.0)
    stale = 0 if progress['best_dice'] != best else progress['stale'] + 1
    logger.info('step %d: validation Dice %.4f, best %.4f', step, dice, best)
    return {'best_dice': best, 'stale': stale}


def out_of_patience(config: ConfigDict, progress: dict[str, Any]) -> bool:
    """Whether `train.patience` validations were no better, which the log says."""
    if not 0 < config.train.patience <= progress['stale']:
        return False
    logger.info('no better Dice in %d validations: stopping', progress['stale'])
    return True


def stopped(number: int, step: int, total: int) -> StoppedError:
    """What a run raises that a signal asked to stop."""
    return StoppedError(
        f'{signal.Signals(number).name}: stopped behind the checkpoint of step {step} of '
        f'{total}; the same command goes on from there',
        number,
    )


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
        if hosts.is_first():
            charts.write_curves(workdir)
    except DataError as error:
        logger.warning('%s', error)


def warn_of_unread(unread: dict[int, str]) -> None:
    """The slices that could not be read, at the end of the run."""
    if unread:
        logger.warning('%d slice(s) could not be read, others were used:', len(unread))
        for reason in unread.values():
            logger.warning('  %s', reason)
