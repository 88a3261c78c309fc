"""Starting a run: from its checkpoints, from pretrained weights, or from random ones."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from pspnet_jax import models
from pspnet_jax.config import base, flatten, from_dict, to_dict, validate
from pspnet_jax.data import volumes
from pspnet_jax.models import weights
from pspnet_jax.runtime import checkpoint, hosts
from pspnet_jax.runtime.errors import CheckpointError, ConfigError
from pspnet_jax.runtime.storage import writing
from pspnet_jax.training import optim, transfer
from pspnet_jax.training.update import TrainState, create_state

logger = logging.getLogger(__name__)


def pretrained_file(config: ConfigDict) -> Path | None:
    """The file that `model.pretrained` names, downloaded if it is not on this machine yet.

    None if the weights are random or come from train.init_from. Raises PretrainedError.
    """
    where = config.model.pretrained
    if not where or config.train.init_from:
        return None
    if where != 'imagenet':
        return weights.fetch(where)
    _, backbone, options = models.resolve(**config.model)
    if backbone is None:
        return None  # the network has its own encoder
    public = weights.public(backbone, **options)
    if public is None:
        logger.warning(
            'there are no ImageNet weights for %s with model.width=%d and its other options: it '
            'starts from random weights',
            backbone,
            config.model.width,
        )
        return None
    return weights.fetch_public(backbone, public)


def normalize_by_weights(config: ConfigDict) -> bool:
    """Whether images are normalised as the pretrained weights expect, not volume by volume."""
    own_choice = 'volume' if config.model.pretrained in ('', 'imagenet') else 'weights'
    return (config.data.normalize or own_choice) == 'weights'


def chosen_normalization(config: ConfigDict) -> weights.Normalization | str | None:
    """What `data.normalize` asks for, before any weights are read (see `checkpoint.save`)."""
    if config.data.normalize == 'buda':
        return 'buda'
    return weights.IMAGENET if normalize_by_weights(config) else None


def normalize_as_there(
    config: ConfigDict, theirs: weights.Normalization | str | None
) -> weights.Normalization | str | None:
    """The normalisation of a run that starts from another: data.normalize, or if None the other's.

    Logs a warning if the two differ.
    """
    if config.data.normalize is None:
        return theirs
    ours = chosen_normalization(config)
    if is_fixed(ours) and is_fixed(theirs):
        ours = theirs
    if ours != theirs:
        there, here = (transfer.words({'normalization': plain(x)}) for x in (theirs, ours))
        logger.warning(
            'the run that the weights come from normalised images %s, this run normalises them %s '
            '(data.normalize=%r): add --config.data.normalize=None to do the same',
            there,
            here,
            config.data.normalize,
        )
    return ours


def is_fixed(normalization: weights.Normalization | str | None) -> bool:
    """Whether it is the same for all images instead of measured volume by volume."""
    return isinstance(normalization, weights.Normalization)


def plain(normalization: weights.Normalization | str | None) -> dict[str, Any] | str | None:
    """The form that a checkpoint's 'inputs' store."""
    return normalization._asdict() if is_fixed(normalization) else normalization


def start_or_resume(
    config: ConfigDict,
    model,
    tx,
    channels: int,
    workdir: str,
    measure: Callable[[], np.ndarray | None] = lambda: None,
):
    """(state, progress, inputs, config) from the newest sound checkpoint, else from pretrained
    weights, another run or random weights.

    `channels` is an image's number of channels. `inputs` is what the network takes (see
    `checkpoint.save`); the config is the checkpoint's, None for a new run. `measure` returns
    `volumes.joint_range` of the training images; it is called if all images share one scale.
    """
    ema = config.train.ema_decay > 0
    context = config.data.context
    seen = volumes.channels_seen(channels, context)
    state = create_state(model, tx, seed=config.seed, channels=seen, ema=ema)
    restored = checkpoint.restore(workdir, state, to_dict(config))
    if restored:
        state, meta = restored
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
    # The average is a copy: the step donates both, and a buffer can be donated only once.
    params = variables['params']
    average = jax.tree.map(jnp.copy, params) if ema else None
    state = state.replace(
        params=params, ema_params=average, batch_stats=variables.get('batch_stats', {})
    )
    inputs = {'channels': channels, 'normalization': plain(normalization)}
    if is_fixed(normalization) and (scale := measure()) is not None:
        inputs['range'] = scale.tolist()
    logger.info('images are normalised %s', transfer.words(inputs))
    return state, {'best_dice': None, 'best_step': None, 'stale': 0, 'skipped': 0}, inputs, None


@dataclasses.dataclass(frozen=True)
class Start:
    """The parts of a run that no update changes."""

    model: nn.Module
    tx: optax.GradientTransformation
    rate: optax.Schedule
    teacher: nn.Module | None
    size: int  # parameters
    inputs: dict[str, Any]  # see `checkpoint.save`
    changed: dict[str, tuple[Any, Any]]  # config changes since the checkpoint


def begin(
    config: ConfigDict,
    workdir: str,
    split: dict[str, volumes.Slices],
    steps: int,
    keep_split: Callable[[], object],
) -> tuple[Start, TrainState, dict[str, Any]]:
    """Model, optimiser, state and progress: restored, or new with pretrained weights.

    The run's other files are written only after everything that can fail; `keep_split` is called
    then.
    """
    model, channels = models.create(**config.model), split['train'].channels
    tx, rate = optim.create(config.optim, steps=steps)
    state, progress, inputs, before = start_or_resume(
        config,
        model,
        tx,
        channels,
        workdir,
        lambda: volumes.joint_range(split['train'], [split['validation'], split['test']]),
    )
    step, now = int(state.step), to_dict(config)
    if before is not None:
        told = 'resuming at' if step < steps else 'training is complete:'
        logger.info('%s step %d of %d', told, step, steps)
    hosts.check_same({'the first step': step, **now})
    teacher = taught = None
    if config.distill.teacher:
        teacher, taught = transfer.load_teacher(
            config.distill.teacher,
            model,
            inputs,
            features=config.distill.pairwise > 0,
            class_names=config.model.class_names,
            context=config.data.context,
        )
    damaged = checkpoint.find_damaged(workdir, state)
    changed = checkpoint.config_changes(before, now) if before else {}
    tell_changes(changed, step)
    if hosts.is_first():  # nothing that the user asked for can fail any more
        checkpoint.set_aside(workdir, damaged)
        keep_split()
        keep_config(workdir, now, step, before if changed else None)
    hosts.wait_for_all()
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    start = Start(model, tx, rate, teacher, size, inputs, changed)
    return start, state.replace(teacher=taught), progress


# Keys that a config may leave open: chosen at the start and stored with the run.
FOUND_OUT = {
    'model.num_classes': None,
    'model.class_names': (),
    'data.size': (),
    'data.fit': None,
    'optim.learning_rate': None,
    'optim.new_layer_factor': None,
    'train.epochs': None,
}
PASSES, FEWEST_STEPS, MOST_STEPS = 50, 400, 10_000  # if neither epochs nor steps are given
PRETRAINED_RATE, RANDOM_RATE = 3e-4, 1e-3
NEW_LAYERS = 3.0  # times PRETRAINED_RATE


def as_before(config: ConfigDict, workdir: str) -> ConfigDict:
    """The config, its open keys filled in from the run's newest sound checkpoint."""
    for step in reversed(checkpoint.steps(workdir)):
        with contextlib.suppress(CheckpointError, ConfigError):
            before = from_dict(checkpoint.metadata(workdir, step)['config'])
            found = flatten(before.to_dict())
            given = flatten(config.to_dict())
            if given['model.num_classes'] not in (None, found['model.num_classes']):
                found['model.class_names'] = ()  # they name other classes
            changes = {k: found[k] for k, is_open in FOUND_OUT.items() if given[k] == is_open}
            if config.train.epochs is None and not config.train.steps:
                changes['train.steps'] = found['train.steps']
            return changed(config, changes)
    return config


def complete(config: ConfigDict, slices: volumes.Slices, training: int) -> ConfigDict:
    """The config, its open keys filled in from the data; the choices are logged.

    `training` is the number of training slices. Raises ConfigError.
    """
    changes: dict[str, Any] = {'data.fit': config.data.fit or 'letterbox'}
    if config.model.num_classes is None:
        changes['model.num_classes'] = slices.num_classes
    count = config.model.num_classes or slices.num_classes
    if not config.model.class_names and len(slices.class_names) == count:
        changes['model.class_names'] = slices.class_names
    several = slices.sizes is not None and len(np.unique(slices.sizes, axis=0)) > 1
    if several and not config.data.size:
        changes['data.size'] = height, width = volumes.common_size(slices.sizes)
        logger.info(
            'images of %d sizes are resized to %dx%d for the network, keeping their aspect ratio; '
            'predicted masks have the original size. Other size: '
            '--config.data.size="(HEIGHT, WIDTH)"',
            len(np.unique(slices.sizes, axis=0)), height, width,
        )  # fmt: skip
    pretrained = bool(config.train.init_from) or starts_pretrained(config)
    if config.optim.learning_rate is None:
        rate = PRETRAINED_RATE if pretrained else RANDOM_RATE
        changes['optim.learning_rate'] = rate
        logger.info(
            'optim.learning_rate is %g, for %s weights', rate,
            'pretrained' if pretrained else 'random',
        )  # fmt: skip
    if config.optim.new_layer_factor is None:
        changes['optim.new_layer_factor'] = NEW_LAYERS if pretrained else 1.0
    if config.train.epochs is None and not config.train.steps:
        changes['train.steps'] = steps = steps_for(training, config.train.batch_size)
        passes = steps * config.train.batch_size / max(training, 1)
        logger.info(
            '%d updates, %.3g passes over %d slices, as neither train.epochs nor train.steps is '
            'given', steps, passes, training,
        )  # fmt: skip
    if config.train.epochs is None:
        changes['train.epochs'] = base.get_config().train.epochs
    return changed(config, changes)


def steps_for(slices: int, batch_size: int) -> int:
    """Updates for PASSES over so many slices, at least FEWEST_STEPS and at most MOST_STEPS."""
    return min(max(round(PASSES * slices / batch_size), FEWEST_STEPS), MOST_STEPS)


def starts_pretrained(config: ConfigDict) -> bool:
    """Whether `pretrained_file` finds weights for the network, without downloading them."""
    if config.model.pretrained != 'imagenet':
        return bool(config.model.pretrained)
    _, backbone, options = models.resolve(**config.model)
    return backbone is not None and weights.public(backbone, **options) is not None


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy with these values, by dotted key, validated."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(changes))
    validate(config)
    return config


NO_EFFECT = ('model.pretrained', 'model.stem', 'train.init_from')  # on a resumed run


def tell_changes(changed: dict[str, tuple[Any, Any]], step: int) -> None:
    """Log what a resumed run does differently from before."""
    idle = [key for key in changed if key in NO_EFFECT]
    listed = [f'{key} from {a!r} to {b!r}' for key, (a, b) in changed.items() if key not in idle]
    if listed:
        logger.warning('the config changed, from step %d on: %s', step, '; '.join(listed))
    if idle:
        logger.warning(
            '%s changed, which has no effect on a resumed run: give another --workdir to start a '
            'new run',
            ', '.join(idle),
        )


def keep_config(
    workdir: str, config: dict[str, Any], step: int, before: dict[str, Any] | None
) -> None:
    """Write WORKDIR/config.json, and if it changed the previous one as config_until_step_N.json."""
    kept = {'config.json': config} | ({f'config_until_step_{step}.json': before} if before else {})
    for name, tree in kept.items():
        with writing(Path(workdir) / name) as aside:
            aside.write_text(json.dumps(tree, indent=1) + '\n')
