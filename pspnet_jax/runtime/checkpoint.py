"""Checkpoints: Orbax saves the full state asynchronously, with the config and a digest.

WORKDIR/checkpoints/<step>/ holds each part of the state separately (params, batch_stats,
ema_params, opt_state), so that evaluation reads only the parameters. Orbax writes a step folder
atomically, but it can't detect a byte that changes later: the metadata holds a sha256 of each
part, and a step that doesn't match is skipped.

A checkpoint may be an untrusted file. Nothing in it is executed, but the storage layer allocates
whatever size the files claim and follows links, so the files are checked first.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from pspnet_jax.runtime import hosts
from pspnet_jax.runtime.errors import CheckpointError, DataError, first_line, not_written
from pspnet_jax.runtime.paths import local
from pspnet_jax.runtime.text import read_json, too_much

logger = logging.getLogger(__name__)

FOLDER = 'checkpoints'
ASIDE = 'damaged'  # next to FOLDER
PARTS_OF_META = {'config', 'progress', 'inputs', 'dice', 'sha256'}
SEAL = 'metadata_sha256'
STEP = re.compile(r'0|[1-9][0-9]{0,9}')
LARGEST = 2**31 - 1  # step
MOST_CHANNELS = 4096
MOST_BYTES = 2**36  # of a state
MOST_TEXT = 2**22  # bytes of a metadata file; 1,000 arrays need 150 kB
CODECS = {'sharding_indexed', 'bytes', 'transpose', 'zstd', 'crc32c'}  # that Orbax uses
DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO
)  # fmt: skip
CONTEXT = 'data.context'  # sets the first kernel's channels; older configs have none, which is 0
PARTS = ('model.', CONTEXT)  # keys that define the network
NO_PART = ('pretrained', 'class_names', 'stem')  # keys of config.model that do not


class Writer:
    """Writes to WORKDIR/checkpoints, and keeps the last step and the best by `dice`.

    Saves are asynchronous: a full or read-only disk raises CheckpointError in the next `save` or in
    `close`. The best step is chosen by the sealed metadata: Orbax's metrics file has no digest.
    """

    def __init__(self, workdir: str | Path):
        self._folder, self._pending = Path(workdir).absolute() / FOLDER, None
        self._dice = _ranked(workdir)
        with _writing(self._folder):
            _replace_metrics(self._folder, self._dice)
            self._checkpointer = ocp.training.Checkpointer(
                self._folder,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=_LastAndBest(self._dice),
                cleanup_tmp_directories=True,
            )

    def start(self, step: int, parts: dict[str, Any], meta: dict[str, Any]) -> None:
        """Wait for the previous save, then start to save `parts` and the sealed metadata."""
        self.wait()
        self._dice[step] = meta['dice']
        sealed = {**meta, SEAL: seal(meta)}
        with _writing(self._folder / str(step)):
            self._pending = (
                step,
                self._checkpointer.save_checkpointables_async(step, parts, custom_metadata=sealed),
            )

    def wait(self) -> None:
        """Wait for the pending save. Its thread and event loop end only here."""
        if self._pending is not None:
            (step, saving), self._pending = self._pending, None
            with _writing(self._folder / str(step)):
                saving.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            with _writing(self._folder):
                self._checkpointer.close()


class _LastAndBest(NamedTuple):
    """Orbax preserves the last step, and the newest of those with the highest Dice."""

    dice: dict[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        ranked = {step: self.dice[step] for step in steps if self.dice.get(step) is not None}
        kept = {max(steps, default=0), best(ranked)}
        return [step in kept for step in steps]


def best(dice: Mapping[int, float | None]) -> int | None:
    """The step with the highest Dice, the newest if several are equal; None if none has a Dice."""
    ranked = [(value, step) for step, value in dice.items() if value is not None]
    return max(ranked)[1] if ranked else None


def _ranked(workdir: str | Path) -> dict[int, float | None]:
    """{step: Dice} of the steps with sound metadata, ascending."""
    dice = {}
    for step in steps(workdir):
        with contextlib.suppress(CheckpointError):
            dice[step] = metadata(workdir, step)['dice']
    return dice


def _replace_metrics(folder: Path, dice: Mapping[int, float | None]) -> None:
    """Write Orbax's own metrics file again if it differs from the sealed metadata.

    Earlier versions wrote it. Orbax reads it at every start and fails if it can't.
    """
    for step, value in dice.items():
        path = folder / str(step) / 'metrics' / 'metrics'
        if not os.path.lexists(path):
            continue
        same = False
        with contextlib.suppress(DataError):
            same = read_json(path) == {'dice': value}
        if not same:
            logger.warning('%s is corrupted and is written again', path)
            path.unlink()
            path.write_text(json.dumps({'dice': value}))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the disk errors of Orbax and its storage layer into CheckpointError."""
    try:
        yield
    except Exception as error:
        if hosts.lost_another(error):  # TimeoutError is an OSError, but not a disk error
            raise hosts.lost() from error
        told = {os.strerror(code) for code in DISK if os.strerror(code) in str(error)}
        if not told and not isinstance(error, OSError):
            raise
        reason = ', '.join(told) or first_line(error)
        raise CheckpointError(not_written(path, reason)) from error


def save(
    writer: Writer,
    step: int,
    state: Any,
    *,
    config: dict[str, Any],
    progress: dict[str, Any],
    inputs: dict[str, Any],
    dice: float | None,
) -> None:
    """Start writing `state` (a TrainState); return once it is copied to host memory.

    `dice` is the validation Dice, which ranks the checkpoint; None if it was not measured.
    `progress` is what the loop needs to resume besides the state. `inputs` is what the network
    takes: 'channels'; 'normalization', one for all images, or None if each volume is normalized by
    its own intensities, or 'buda' if that is done as in Buda's code; and, with one normalization
    and images that are not 8-bit, 'range': (2, channels), the values that become 0 and 255.
    Raises CheckpointError if this or the previous save could not be written.
    """
    # A copy: the next step reuses the donated buffers while Orbax still writes.
    parts = jax.tree.map(lambda x: np.array(x, copy=True), _parts(state))
    meta = {
        'config': config,
        'progress': progress,
        'inputs': inputs,
        'dice': dice,
        'sha256': {name: digest(tree) for name, tree in parts.items()},
    }
    writer.start(step, parts, meta)


def _parts(state: Any) -> dict[str, Any]:
    """The state's fields that hold arrays; `step` is the folder's name."""
    fields = ('params', 'batch_stats', 'ema_params', 'opt_state')
    parts = {name: getattr(state, name) for name in fields}
    return {name: tree for name, tree in parts.items() if jax.tree.leaves(tree)}


def digest(tree: Any) -> str:
    """sha256 over path, dtype, shape and bytes of every array."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        sha.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
        sha.update(array.data)
    return sha.hexdigest()


def seal(meta: dict[str, Any]) -> str:
    """sha256 of the metadata as JSON."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def steps(workdir: str | Path) -> list[int]:
    """Steps with a finished checkpoint, ascending."""
    folder = Path(workdir) / FOLDER
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir())
    return sorted(int(n) for n in names if STEP.fullmatch(n) and int(n) <= LARGEST)


def metadata(workdir: str | Path, step: int) -> dict[str, Any]:
    """The config, progress, Dice and digests that were saved with `step`."""
    path = Path(workdir).absolute() / FOLDER / str(step)
    try:
        _check_files(path)
        found = ocp.checkpointables_metadata(path).custom_metadata
    except CheckpointError:
        raise
    except Exception as error:  # Orbax passes on whatever its storage layer raises
        raise CheckpointError(f'{path} has no readable metadata: {first_line(error)}') from error
    if not isinstance(found, dict) or found.keys() - {SEAL} != PARTS_OF_META:
        raise CheckpointError(
            f'{path} is not a checkpoint of pspnet_jax: its metadata is incomplete'
        )
    sealed = found.pop(SEAL, None)  # the oldest checkpoints have none
    if sealed not in (None, seal(found)):
        raise CheckpointError(f'{path} has corrupted metadata: its sha256 differs')
    for key, value in found.items():
        if not _allowed(key, value):
            raise CheckpointError(
                f'{path} is not a checkpoint of pspnet_jax: its metadata has {key} {value!r:.200}'
            )
    check_inputs(found['inputs'], path)
    return found


def _allowed(key: str, value: Any) -> bool:
    """Whether a metadata value has the types and ranges that the readers rely on."""
    if key == 'dice':
        return value is None or _is_number(value, 0, 1)
    if not isinstance(value, dict):
        return False
    if key == 'progress':
        best, at = value.get('best_dice'), value.get('best_step')
        counts = [value.get('stale', 0), value.get('skipped', 0), *([] if at is None else [at])]
        return all(type(n) is int and 0 <= n <= LARGEST for n in counts) and (
            best is None or _is_number(best, -1, 1)
        )
    if key == 'sha256':
        return all(isinstance(text, str) for text in value.values())
    if key == 'config':
        sections = [x if isinstance(x, dict) else {'': x} for x in value.values()]
        knobs = [x for section in sections for x in section.values()]
        return isinstance(value.get('model'), dict) and not any(map(_is_nested, knobs))
    return True


def _is_nested(value: Any) -> bool:
    value = list(value.values()) if isinstance(value, dict) else value  # such as data.label_map
    inside = value if isinstance(value, list) else [value]
    return any(isinstance(x, list | dict) for x in inside)


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def check_inputs(inputs: Any, path: str | Path) -> None:
    """Raise CheckpointError if the metadata's 'inputs' fit no network: see `save`."""
    try:
        channels, how = inputs['channels'], inputs['normalization']
        sound = type(channels) is int and 1 <= channels <= MOST_CHANNELS
        if how not in (None, 'buda'):
            numbers = [*how['mean'], *how['std']]
            sound &= how.keys() == {'mean', 'std', 'trained_order'}
            sound &= len(how['mean']) == len(how['std']) == 3 and min(how['std']) > 0
            sound &= all(_is_number(x, -1e6, 1e6) for x in numbers)
            sound &= how['trained_order'] in ('RGB', 'BGR')
        if 'range' in inputs:
            low, high = inputs['range']
            sound &= how not in (None, 'buda') and len(low) == len(high) == channels
            sound &= all(_is_number(x, -1e30, 1e30) for x in (*low, *high))
            sound &= all(a < b for a, b in zip(low, high, strict=True))
    except (KeyError, TypeError, AttributeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            f'{path} is not a checkpoint of pspnet_jax: its network takes {inputs!r:.200}'
        )


def _check_files(path: Path) -> int:
    """Bytes of a step's files. Raises CheckpointError for files that no checkpoint contains."""
    total = 0
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            here = os.path.join(folder, name)
            found = os.lstat(here)
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise CheckpointError(f'{here} is a link or device, not a file or folder')
            text = os.path.basename(folder) != 'd' and stat.S_ISREG(found.st_mode)
            if text and found.st_size > MOST_TEXT:
                raise CheckpointError(
                    f'{here} has {found.st_size:,} bytes, more than the {MOST_TEXT:,} that '
                    'metadata may have'
                )
            total += found.st_size
    return total


def _check_arrays(path: Path, abstract: dict[str, Any]) -> None:
    """Raise CheckpointError if `abstract` is more than the files can hold, or if an array's chunks
    are larger than the array: the storage layer allocates whole chunks.
    """
    claimed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    if fault := too_much(path, claimed, _check_files(path), MOST_BYTES):
        raise CheckpointError(fault)
    for part in abstract:
        where = path / part
        kind = json.loads((where / '_METADATA').read_bytes())
        if not (kind['use_ocdbt'] is True and kind['use_zarr3'] is True):
            raise CheckpointError(f'{where} is not in the format of a pspnet_jax checkpoint')
        kept = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': where.as_uri()}).result()
        names = [name for name in kept.list().result() if name.endswith(b'zarr.json')]
        for name, read in [(name, kept.read(name)) for name in names]:
            text = read.result().value
            array = json.loads(text[:MOST_TEXT])
            pieces, codecs = [array['chunk_grid']['configuration']], list(array['codecs'])
            for codec in codecs:  # grows by the nested codecs
                how = codec.get('configuration', {})
                codecs += [*how.get('codecs', ()), *how.get('index_codecs', ())]
                pieces += [how] if 'chunk_shape' in how else []
            most = max(1, math.prod(array['shape']))
            if any(not 0 < math.prod(piece['chunk_shape']) <= most for piece in pieces) or not (
                {codec['name'] for codec in codecs} <= CODECS
            ):
                raise CheckpointError(
                    f'{where} stores {name[:200]!r} in pieces that pspnet_jax never writes'
                )


def restore(
    workdir: str | Path, state: Any, config: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """`state` with every array from the newest sound checkpoint, and its metadata.

    None if there is no checkpoint at all. Corrupted ones are skipped with a warning. Raises
    CheckpointError if all are corrupted or the model is not the config's.
    """
    abstract = _parts(jax.eval_shape(lambda: state))

    def read(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        meta = metadata(workdir, step)
        if _refused(config_changes(meta['config'], config)):
            return {}, meta
        return _load(workdir, step, abstract, meta), meta

    if not steps(workdir):
        return None
    step, (parts, meta), passed_over = first_sound(workdir, 'last', read)
    if refused := _refused(config_changes(meta['config'], config)):
        raise CheckpointError(
            f'{workdir} holds checkpoints that this config can not resume ({"; ".join(refused)}): '
            'give the config that the run was trained with, or another --workdir; to start there '
            f'from these weights, add --config.train.init_from={workdir}'
        )
    for reason in passed_over.values():
        logger.warning('%s; this checkpoint is skipped', reason)
    return state.replace(step=jnp.asarray(step, jnp.int32), **parts), meta


def find_damaged(workdir: str | Path, state: Any) -> list[int]:
    """Steps whose metadata or arrays are corrupted; `state` gives the arrays' shapes.

    On several hosts, all must call it.
    """
    abstract, found = _parts(jax.eval_shape(lambda: state)), []
    for step in steps(workdir):
        try:
            _load(workdir, step, abstract, metadata(workdir, step))
        except CheckpointError:
            found.append(step)
    return found


def set_aside(workdir: str | Path, damaged: Sequence[int]) -> None:
    """Move these steps to WORKDIR/damaged: a resumed run may save them again, and a corrupted best
    checkpoint must not replace a sound one.
    """
    for step in damaged:
        source, target = Path(workdir) / FOLDER / str(step), Path(workdir) / ASIDE
        with _writing(target):
            target.mkdir(exist_ok=True)
            while (target / source.name).exists():
                target = target / 'before'
                target.mkdir(exist_ok=True)
            os.rename(source, target / source.name)
        logger.warning('%s is corrupted and was moved to %s', source, target)


def restore_variables(
    workdir: str | Path, step: int, variables: dict[str, Any], meta: dict[str, Any]
) -> dict[str, Any]:
    """{'params', 'batch_stats'} for inference, with the averaged parameters if there are any.

    `variables` gives shapes and dtypes, `meta` is the step's `metadata`; returns numpy arrays.
    """
    averaged = 'ema_params' in meta['sha256']
    abstract = {'ema_params' if averaged else 'params': variables['params']}
    if jax.tree.leaves(variables.get('batch_stats', {})):
        abstract['batch_stats'] = variables['batch_stats']
    parts = _load(workdir, step, abstract, meta)
    if averaged:
        parts['params'] = parts.pop('ema_params')
    return parts


def candidates(workdir: str | Path, which: str = 'best') -> list[int]:
    """Steps in the order in which to try them for 'best' (by validation Dice), 'last' or a step.

    For a step, only that one is tried. Raises CheckpointError if there is none.
    """
    found = steps(workdir)
    if not found:
        raise CheckpointError(
            f'{workdir} holds no checkpoint: expected {Path(workdir) / FOLDER}/<step>; '
            'give the --workdir of a training run'
        )
    if which == 'last':
        return found[::-1]
    if which == 'best':
        dice = _ranked(workdir)

        def rank(step: int) -> tuple[float, int]:
            if step not in dice:  # corrupted metadata: it may be the best, so the warning names it
                return 2.0, step
            return -1.0 if dice[step] is None else dice[step], step

        return sorted(found, key=rank, reverse=True)
    if which not in map(str, found):
        raise CheckpointError(f"checkpoint {which!r} is not one of 'best', 'last', {found}")
    return [int(which)]


def first_sound(
    workdir: str | Path, which: str, read: Callable[[int], Any]
) -> tuple[int, Any, dict[int, str]]:
    """(step, `read(step)`, {skipped step: why}) of the first candidate that `read` can read.

    `read` raises CheckpointError for a corrupted step. A run that is still training replaces its
    steps and deletes their folders file by file, so a step counts as corrupted only if a second
    look finds the same steps and the same faults. Raises CheckpointError.
    """
    before = None
    for _ in range(100):
        found, passed_over, taken = steps(workdir), {}, None
        for step in candidates(workdir, which):
            try:
                taken = step, read(step), passed_over
                break
            except CheckpointError as error:
                passed_over[step] = str(error)
        looked = found, set(passed_over)
        if not passed_over or (looked == before and steps(workdir) == found):
            break
        before = looked
    if taken:
        return taken
    if which not in ('best', 'last'):
        raise CheckpointError(*passed_over.values())
    raise CheckpointError(
        f'all checkpoints {found} in {Path(workdir) / FOLDER} are corrupted: copy them again, or '
        'train in another --workdir',
        list(passed_over.values()),
    )


def locate(where: str) -> tuple[str, str]:
    """(workdir, which) of 'WORKDIR@last', 'WORKDIR@260' or 'WORKDIR', which means 'best'."""
    workdir, which = re.fullmatch(r'(.+?)(?:@(best|last|\d+))?', where, re.DOTALL).groups()
    return str(local(workdir)), which or 'best'


def _load(workdir, step, abstract, meta) -> dict[str, Any]:
    path = Path(workdir).absolute() / FOLDER / str(step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract
    )
    try:
        _check_arrays(path, abstract)
        parts = ocp.load_checkpointables(path, abstract)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax passes on whatever its storage layer raises
        raise CheckpointError(f'{path} can not be read: {first_line(error)}') from error
    # On the host: the caller places them on its devices.
    parts = jax.tree.map(np.asarray, parts)
    for name, tree in parts.items():
        if digest(tree) != meta['sha256'].get(name):
            raise CheckpointError(f'{path}/{name} is corrupted: its sha256 differs')
    return parts


def model_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """['model.width is 32 there, 64 here', ...]: how the networks of two configs differ."""
    return [fault for fault in _refused(config_changes(there, here)) if fault.startswith(PARTS)]


def config_changes(there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (value there, value here)} of the keys in which two configs differ.

    A key that is newer than a config is left out: its default changes nothing.
    """
    old, new = {CONTEXT: 0, **_flat(there)}, _flat(here)
    return {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    sections = {k: v if isinstance(v, dict) else {'': v} for k, v in tree.items()}
    return {f'{k}.{knob}'.rstrip('.'): x for k, v in sections.items() for knob, x in v.items()}


def _refused(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """['model.width is 32 there, 64 here', ...]: changes that the saved arrays do not fit."""
    return [
        f'{key} is {before!r:.200} there, {now!r:.200} here'
        for key, (before, now) in changes.items()
        if (key.startswith('model.') and key.removeprefix('model.') not in NO_PART)
        or key in ('optim.name', CONTEXT)
        or (key in ('train.ema_decay', 'optim.clip_norm') and bool(before) != bool(now))
    ]
