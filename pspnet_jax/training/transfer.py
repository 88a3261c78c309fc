"""What a run takes from another run: its initial weights (train.init_from) or its teacher.

Both are given as WORKDIR (the best checkpoint), WORKDIR@last or WORKDIR@STEP, and need only that
folder's checkpoints. The other run may be a published network that `convert` turned into a run.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pspnet_jax.data.volumes import channels_seen
from pspnet_jax.inference.runs import open_run
from pspnet_jax.models.weights import Normalization, adapt_stem, fixed_intensity, measured_how
from pspnet_jax.runtime import checkpoint
from pspnet_jax.runtime.errors import CheckpointError, ConfigError, one_line


def first_weights(
    variables: Mapping[str, Any], where: str, *, channels: int, stem: str, context: int = 0
) -> tuple[dict[str, Any], Normalization | str | None, str]:
    """(`variables` with the matching weights of the run at `where`, its normalisation, a report).

    It takes the average of that run's parameters if there is one. The normalisation is None or
    'buda' if it is volume by volume. `channels` and `context` describe the images here: if that
    run's differ, its first kernel is adapted by `stem` (`models.weights.adapt_stem`). Raises
    CheckpointError if there is no checkpoint or nothing in it fits.
    """
    workdir, which = checkpoint.locate(where)
    run = open_run(workdir, which)
    merged, report = merge(
        variables,
        run.variables,
        channels=channels,
        their_channels=run.channels,
        stem=stem,
        context=context,
        their_context=run.context,
    )
    theirs = run.config.model
    name = f'{workdir}, step {run.step} ({theirs.name}, {theirs.num_classes} classes)'
    if merged is None:
        raise CheckpointError(f'no weights of {name} fit this network:\n{report}')
    normalization = run.inputs['normalization']
    if isinstance(normalization, Mapping):
        normalization = Normalization(**normalization)
    return merged, normalization, f'from {name}:\n{report}'


def merge(
    variables: Mapping[str, Any],
    theirs: Mapping[str, Any],
    *,
    channels: int,
    their_channels: int,
    stem: str = 'cycle',
    context: int = 0,
    their_context: int = 0,
) -> tuple[dict[str, Any] | None, str]:
    """(`variables` with each module of `theirs` of the same path and shapes, a report).

    The variables are None if there is no such module. A module is copied whole or not at all: of a
    classifier with other classes neither kernel nor bias is copied. Only the kernel that sees the
    image may have other channels.
    """
    ours: dict[str, Any] = flatten_dict(dict(variables), sep='/')
    found = {name: np.asarray(x) for name, x in flatten_dict(dict(theirs), sep='/').items()}
    notes = []
    seen, their_seen = (
        channels_seen(channels, context),
        channels_seen(their_channels, their_context),
    )
    for name in sorted(ours.keys() & found.keys()):
        here, there = ours[name].shape, found[name].shape
        same = (channels, context) == (their_channels, their_context)
        if not same and _sees_image(here, seen, there, their_seen):
            contexts = {'context': context, 'their_context': their_context}
            found[name] = adapt_stem(found[name], channels, stem, **contexts)
            notes.append(f'{name} from {their_seen} to {seen} channels by {stem}')
    differing = {
        name: f'{name} is {found[name].shape} there, {tuple(ours[name].shape)} here'
        for name in sorted(ours.keys() & found.keys())
        if tuple(ours[name].shape) != found[name].shape
    }
    partial = set(map(_module, differing))
    taken = {
        name: np.asarray(found[name], ours[name].dtype)
        for name in ours.keys() & found.keys()
        if _module(name) not in partial
    }
    values = sum(x.size for x in taken.values())
    lines = [
        f'  copied {values:,} of {sum(x.size for x in ours.values()):,} values '
        f'({len(taken)} of {len(ours)} arrays)',
        f'  only in that run, not used: {_summary(found.keys() - ours.keys())}',
        f'  only in this network, initialised afresh: {_summary(ours.keys() - found.keys())}',
        f'  of another shape, initialised afresh: {"; ".join(differing.values()) or "none"}',
    ]
    lines += [f'  adapted: {"; ".join(notes)}'] if notes else []
    lines = [one_line(line) for line in lines]  # names of an untrusted file
    merged = unflatten_dict({**ours, **taken}, sep='/') if taken else None
    return merged, '\n'.join(lines)


def _sees_image(here, channels: int, there, their_channels: int) -> bool:
    """Whether two shapes are those of kernels that differ only in the image's channels."""
    one, other = (*here[:2], channels, *here[3:]), (*there[:2], their_channels, *there[3:])
    return (
        len(here) == len(there) == 4
        and tuple(here) == one
        and tuple(there) == other
        and one[:2] + one[3:] == other[:2] + other[3:]
    )


def _module(name: str) -> str:
    """'params/head/conv/kernel' -> 'head/conv', the same for its statistics."""
    return name.split('/', 1)[1].rpartition('/')[0]


def _summary(names) -> str:
    """'head (4 arrays), aux (6 arrays)', by the network's top-level modules."""
    count = collections.Counter(name.split('/')[1] for name in names)
    return ', '.join(f'{module} ({n} arrays)' for module, n in sorted(count.items())) or 'none'


def load_teacher(
    where: str,
    student: nn.Module,
    inputs: Mapping[str, Any],
    *,
    features: bool,
    class_names: Sequence[str] = (),
    context: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """(network, variables) of the run at `where`, to teach `student`.

    Both see the same images, so classes, channels, context and normalisation must be the same.
    `inputs` are the student's (see `checkpoint.save`), `class_names` and `context` its config's.
    With `features` both need a backbone. Raises CheckpointError, and ConfigError that names both
    sides.
    """
    workdir, which = checkpoint.locate(where)
    run = open_run(workdir, which)
    teacher, theirs = run.model, run.inputs
    name = f'distill.teacher {workdir}, step {run.step},'
    classes = run.config.model.num_classes
    if classes != student.num_classes:
        raise ConfigError(
            f'{name} has {classes} classes, but this run has {student.num_classes}: give '
            f'--config.model.num_classes={classes} or another teacher'
        )
    named = run.config.model.class_names
    if class_names and named not in ((), tuple(class_names)):
        raise ConfigError(
            f'{name} names its classes {named}, this run {tuple(class_names)} '
            '(model.class_names): give this run the names of the teacher'
        )
    if theirs['channels'] != inputs['channels']:
        raise ConfigError(
            f'{name} takes {theirs["channels"]} channels, but the images here have '
            f'{inputs["channels"]}: use a teacher that was trained on such images'
        )
    if run.context != context:
        raise ConfigError(
            f'{name} has data.context={run.context}, but this run has {context}: set '
            f'--config.data.context={run.context}, or use a teacher that sees as many slices'
        )
    if measured_how(theirs) != measured_how(inputs) or not np.array_equal(
        fixed_intensity(theirs), fixed_intensity(inputs)
    ):
        raise ConfigError(
            f'{name} was trained on images normalised {words(theirs)}, but this run normalises '
            f'them {words(inputs)}: set --config.data.normalize as in that run; a measured range '
            'depends on the training cases, so also use the same split (data.split_file)'
        )
    for side, module in (('the teacher', teacher), ('this network', student)):
        if features and not hasattr(module, 'backbone'):
            raise ConfigError(
                f'distill.pairwise compares the backbones, but {side} '
                f'({type(module).__name__}) has none: set --config.distill.pairwise=0'
            )
    return teacher, run.variables


def words(inputs: Mapping[str, Any]) -> str:
    """'volume by volume' or 'by mean (...) and deviation (...)', from a checkpoint's 'inputs'."""
    normalization = inputs['normalization']
    if normalization is None:
        return 'volume by volume'
    if normalization == 'buda':
        return "volume by volume as Buda's code does"
    mean, std = (tuple(normalization[key]) for key in ('mean', 'std'))
    by = f'by mean {mean} and deviation {std}'
    if 'range' not in inputs:
        return by
    low, high = (', '.join(f'{x:.4g}' for x in dict.fromkeys(row)) for row in inputs['range'])
    return f'{by}, after {low} to {high}, measured over the training images, became 0 to 255'
