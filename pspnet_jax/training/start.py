"""Starting a run: from its checkpoints, from pretrained weights, or from random ones."""

import collections
import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from pspnet_jax import models
from pspnet_jax.config import from_dict, to_dict, validate
from pspnet_jax.data import volumes
from pspnet_jax.models import weights
from pspnet_jax.runtime import checkpoint, hosts
from pspnet_jax.runtime.errors import CheckpointError, ConfigError
from pspnet_jax.runtime.storage import writing
from pspnet_jax.training import optim, transfer
from pspnet_jax.training.update import TrainState, create_state

logger = logging.getLogger(__name__)


def parameter_table(params: Any) -> str:
    """Values in each second-level module, and the total."""
    rows = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        rows['/'.join(entry.key for entry in path[:2])] += leaf.size
    rows['total'] = sum(rows.values())
    return '\n'.join(f'  {name:32} {size:12,}' for name, size in rows.items())


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


@dataclasses.dataclass(frozen=True)
class Start:
    """The parts of a run that no update changes."""

    model: nn.Module
    tx: optax.GradientTransformation
    rate: optax.Schedule
    teacher: nn.Module | None
    inputs: dict[str, Any]  # `checkpoint.save`'s
    changed: dict[str, tuple[Any, Any]]  # of the config, since the checkpoint


def begin(
    config: ConfigDict,
    workdir: str,
    split: dict[str, volumes.Slices],
    steps: int,
    keep_split: Callable[[], object],
) -> tuple[Start, TrainState, dict[str, Any]]:
    """Model, optimiser, state and progress: restored, or new with pretrained weights.

    What a run keeps beside its checkpoints is written once nothing that was asked for can fail any
    more; `keep_split` is called then.
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
    if hosts.is_first():  # nothing that was asked for fails now
        checkpoint.set_aside(workdir, damaged)
        keep_split()
        keep_config(workdir, now, step, before if changed else None)
    hosts.wait_for_all()
    start = Start(model, tx, rate, teacher, inputs, changed)
    return start, state.replace(teacher=taught), progress


def name_classes(config: ConfigDict, names: Sequence[str]) -> ConfigDict:
    """The config with these names of its classes, if it has none of its own."""
    if config.model.class_names or len(names) != config.model.num_classes:
        return config
    config = config.copy_and_resolve_references()
    config.model.class_names = tuple(names)
    validate(config)
    return config


def stored_class_names(workdir: str) -> Sequence[str]:
    """Those of the run's newest sound checkpoint; () where there is none."""
    for step in reversed(checkpoint.steps(workdir)):
        with contextlib.suppress(CheckpointError, ConfigError):
            return from_dict(checkpoint.metadata(workdir, step)['config']).model.class_names
    return ()


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
