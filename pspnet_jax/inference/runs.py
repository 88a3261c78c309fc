"""A trained network, opened from its checkpoint folder for evaluation, prediction and export."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax import models
from pspnet_jax.config import from_dict, to_dict
from pspnet_jax.data.volumes import channels_seen
from pspnet_jax.inference import choice, saved
from pspnet_jax.inference.networks import abstract_variables
from pspnet_jax.models.weights import fixed_intensity, measured_how
from pspnet_jax.runtime import checkpoint, paths
from pspnet_jax.runtime.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """`variables` are params (their average if there is one) and batch_stats, as numpy arrays.

    `inputs` is what the network takes (see `checkpoint.save`). `passed_over` gives the reason for
    each corrupted step that was skipped before `step`. `digest` covers all arrays of the
    checkpoint, so the same weights are recognised in any folder. The `variables` of an ensemble of
    several `members` have a leading axis for them.
    """

    config: ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    inputs: dict[str, Any]
    step: int
    passed_over: dict[int, str]
    digest: str
    members: int = 1

    @property
    def channels(self) -> int:
        """Channels of an image; with `context` the network sees `volumes.channels_seen`."""
        return self.inputs['channels']

    @property
    def context(self) -> int:
        return self.config.data.context

    @property
    def intensity(self) -> np.ndarray | None:
        """(4, C) that normalises every image alike; None if each volume has its own."""
        return fixed_intensity(self.inputs)

    @property
    def measured(self) -> str:
        """How each volume's own intensities are measured, for `data.volumes.measure`."""
        return measured_how(self.inputs)


def open_run(workdir: str | Path, which: str = '') -> Run:
    """Open the step that `which` names: 'best', 'last' or a number; '' means `eval.checkpoint`.

    Without checkpoints, the exported model.safetensors is opened if it is there. Corrupted steps
    are skipped with a warning, unless one is asked for by its number. Raises CheckpointError if
    none is sound, ConfigError if the config describes no network.
    """
    workdir = paths.local(workdir)
    if (workdir / saved.NAME).is_file() and not checkpoint.steps(workdir):
        return _open_saved(workdir / saved.NAME, which)
    if not which:
        _, meta, _ = checkpoint.first_sound(
            workdir, 'last', functools.partial(checkpoint.metadata, workdir)
        )
        which = from_dict(meta['config']).eval.checkpoint

    def read(step: int) -> tuple[dict[str, Any], ConfigDict, nn.Module, dict[str, Any]]:
        meta = checkpoint.metadata(workdir, step)
        config = from_dict(meta['config'])
        model = models.create(**config.model)
        seen = channels_seen(meta['inputs']['channels'], config.data.context)
        shapes = abstract_variables(model, seen)
        variables = checkpoint.restore_variables(workdir, step, shapes, meta)
        return meta, config, model, variables

    step, (meta, config, model, variables), passed_over = checkpoint.first_sound(
        workdir, which, read
    )
    for reason in passed_over.values():
        logger.warning('%s: taking step %d', reason, step)
    digest = hashlib.sha256(json.dumps(meta['sha256'], sort_keys=True).encode()).hexdigest()[:16]
    return Run(config, model, variables, meta['inputs'], step, passed_over, digest)


def open_runs(workdirs: Sequence[str | Path], which: str = '') -> list[Run]:
    """Runs whose probabilities can be averaged.

    Raises CheckpointError for runs of different networks or differently normalised images, and what
    `open_run` raises.
    """
    runs = [open_run(workdir, which) for workdir in workdirs]
    first = runs[0]
    for workdir, other in zip(workdirs[1:], runs[1:], strict=True):
        faults = checkpoint.model_differences(to_dict(first.config), to_dict(other.config))
        intensities: list[Any] = [first.intensity, other.intensity]
        if not np.array_equal(*intensities) or first.measured != other.measured:
            faults.append('images are normalised differently (data.normalize)')
        ours, theirs = first.config.model.class_names, other.config.model.class_names
        if ours and theirs and ours != theirs:
            faults.append(f'model.class_names is {ours} there, {theirs} here')
        if faults:
            raise CheckpointError(
                f'{workdirs[0]} (there) and {workdir} (here) can not be averaged: '
                f'{"; ".join(faults)}: give runs of one config'
            )
    if runs[1:] and any((paths.local(each) / choice.KEPT).exists() for each in workdirs):
        logger.info(
            '%s was chosen for a single run: not applied to the mean of %d runs',
            choice.KEPT, len(runs),
        )  # fmt: skip
    return runs


def together(runs: Sequence[Run]) -> Run:
    """The ensemble of `open_runs` as one Run, with config and step of the first."""
    if len(runs) == 1:
        return runs[0]
    variables = jax.tree.map(lambda *arrays: np.stack(arrays), *(run.variables for run in runs))
    digest = '-'.join(run.digest for run in runs)
    return dataclasses.replace(runs[0], variables=variables, digest=digest, members=len(runs))


def _open_saved(path: Path, which: str) -> Run:
    variables, metadata = saved.read_params(path)
    config, step = from_dict(metadata['config']), metadata['step']
    if which not in ('', 'best', 'last', str(step)):
        raise CheckpointError(f'{path} holds only step {step}: leave out --checkpoint={which}')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    model = models.create(**config.model)
    return Run(config, model, variables, metadata['inputs'], step, {}, digest)
