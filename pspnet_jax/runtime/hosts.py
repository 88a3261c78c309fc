"""Several processes as one run: how they start, share out what there is, gather it and stop.

The same command on every host, with --coordinator, --num_processes and --process_id; on Slurm, a
TPU pod or under Open MPI it finds them by itself. A single process goes through none of this.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from pspnet_jax.runtime.errors import ConfigError, HostError

START_SECONDS = 300  # that processes wait for each other at the start
END_SECONDS = 3600  # and at the end, while the first one writes the report
LAST_SECONDS = 1  # between an error of several processes and the end
NOT_TOGETHER = (
    'error: the processes did not come together in {} s: start them all, with one --coordinator'
)
ENDED = (
    'error: process {} of {} ended before its work was done, or another one stopped answering '
    '(--host_timeout={} s): the first error of all processes says why. Start all again: the run '
    'resumes from its last checkpoint'
)


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Join the other processes, before anything touches a device; nothing for a single one.

    Where nothing is given, those of Slurm, a TPU pod or Open MPI, as `jax.distributed` finds
    them. Raises ConfigError for part of the three; where the others do not come, JAX's runtime
    ends the process, and NOT_TOGETHER is said.
    """
    given = (coordinator, num_processes, process_id)
    options: dict[str, Any] = {
        'heartbeat_timeout_seconds': timeout,
        'initialization_timeout': START_SECONDS,
        'shutdown_timeout_seconds': END_SECONDS,
    }
    if timeout < 5:
        raise ConfigError(f'--host_timeout={timeout} is too short: give at least 5 seconds')
    if given == (None, None, None):
        found = find_cluster(os.environ)
        if not found:
            return
        _watch()
        try:
            jax.distributed.initialize(**options)
        except ValueError as error:
            _watch_no_more()
            if found == 'tpu':  # libtpu is installed, and this is no pod
                return
            raise HostError(f'{found} starts several processes, but: {error}') from error
    else:
        if coordinator is None or num_processes is None or process_id is None:
            raise ConfigError(
                '--coordinator, --num_processes and --process_id belong together: give all three'
            )
        if not re.fullmatch(r'.+:\d+', coordinator):
            raise ConfigError(f'--coordinator={coordinator} is not HOST:PORT, of process 0')
        if not 0 <= process_id < num_processes:
            raise ConfigError(
                f'--process_id={process_id} is not one of 0 to {num_processes - 1}, '
                f'as --num_processes={num_processes} has it'
            )
        if num_processes == 1:
            return
        _watch()
        jax.distributed.initialize(*given, cluster_detection_method='deactivate', **options)
    _say_at_an_abort(ENDED.format(jax.process_index(), jax.process_count(), timeout))


def find_cluster(environment: Mapping[str, str]) -> str | None:
    """'slurm', 'ompi', 'tpu', or None: what starts several processes here, as far as it can be
    known without touching a device. One task of Slurm or Open MPI is no cluster.
    """
    slurm = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_PROCID', 'SLURM_LOCALID')
    if all(name in environment for name in slurm):
        return 'slurm' if int(environment.get('SLURM_NTASKS', 1)) > 1 else None
    if 'OMPI_COMM_WORLD_SIZE' in environment:
        return 'ompi' if int(environment['OMPI_COMM_WORLD_SIZE']) > 1 else None
    tpu = 'tpu' in environment.get('JAX_PLATFORMS', 'tpu')
    return 'tpu' if tpu and importlib.util.find_spec('libtpu') else None


def _watch() -> None:
    """Start a shell beside this process that prints a last line if the process ends before Python.

    JAX's runtime aborts the process when another one is silent for --host_timeout, or at once when
    process 0 is gone: nothing in the process itself can print then.
    """
    global _watcher
    script = (
        'while IFS= read -r line; do last=$line; done; '
        '[ "$last" = done ] || printf "%s\\n" "$last" >&2'
    )
    _watcher = subprocess.Popen(['sh', '-c', script], stdin=subprocess.PIPE, start_new_session=True)
    # Registered before JAX's own: these go last, but for one that waits for the others.
    atexit.register(_watch_no_more)
    _say_at_an_abort(NOT_TOGETHER.format(START_SECONDS))


def _say_at_an_abort(words: str) -> None:
    """One line for the shell, in place of the one before."""
    line = words.replace('\n', ' ').encode(errors='backslashreplace')
    if _watcher and _watcher.stdin:
        with contextlib.suppress(BrokenPipeError):  # somebody ended the shell
            _watcher.stdin.write(line + b'\n')
            _watcher.stdin.flush()


def _watch_no_more() -> None:
    global _watcher
    if _watcher:
        _say_at_an_abort('done')
        _watcher = None


_watcher: subprocess.Popen | None = None


def several() -> bool:
    """Whether `start` found other processes; touches no device."""
    return _watcher is not None


def lost_another(error: Exception) -> bool:
    """Whether this is what is raised where the other side of a collective, or of what Orbax waits
    for, is gone.
    """
    words = ('gloo', 'nccl', 'connection', 'coordination', 'heartbeat', 'deadline', 'unavailable')
    text = str(error).lower()
    told = isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in words)
    return several() and (told or isinstance(error, TimeoutError))


def lost() -> HostError:
    """What a person needs to know then."""
    return HostError(
        f'process {jax.process_index()} of {jax.process_count()} has lost another: the first error '
        'of all processes says why. Start all again: the run resumes from its last checkpoint'
    )


def leave_after_an_error(words: str = '') -> NoReturn:
    """Say `words` on stderr and end with status 1; the other processes then stop too.

    Python's way out would first wait for other processes, as they wait for this one, and for
    threads: those of a save on a disk that became read-only end after minutes.
    """
    if several() and words:
        # JAX's runtime may abort this process for the same reason, with a list of all stacks: the
        # shell then says behind that what the reason is.
        _say_at_an_abort(words)
    with contextlib.suppress(OSError):  # nobody reads them any more
        if words:
            print(words, file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
    if several():
        time.sleep(LAST_SECONDS)  # for that list, which would be cut here, and come last
        _watch_no_more()
    os._exit(1)


def is_first() -> bool:
    """Whether this process writes logs and reports."""
    return jax.process_index() == 0


def share(items: Sequence[Any]) -> list[Any]:
    """Every n-th of `items` for this one of n processes."""
    return list(items[jax.process_index() :: jax.process_count()])


def gather(rows: Sequence[Any]) -> list[Any]:
    """The rows of all processes, those of process 0 first, on each; they are values of JSON.

    All processes call it together.
    """
    if jax.process_count() == 1:
        return list(rows)
    text = np.frombuffer(json.dumps(list(rows)).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).ravel()
    texts = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - len(text))))
    parts = zip(texts, sizes, strict=True)
    return [row for text, size in parts for row in json.loads(text[:size].tobytes())]


def wait_for_all() -> None:
    """Returns on each process when all have called it."""
    gather([])


def check_same(facts: Mapping[str, Any]) -> None:
    """Raise HostError on every process if a leaf of `facts`, a value of JSON, differs in one."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(facts))
    ours = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
    first, *others = gather([ours])
    for n, theirs in enumerate(others, 1):
        for name in sorted(first.keys() | theirs.keys()):
            here, there = first.get(name), theirs.get(name)
            if here != there:
                raise HostError(
                    f'{name} is {here!r} in process 0 and {there!r} in process {n}: give all the '
                    'same command, and as --workdir a folder that all of them share'
                )


def nearest_batches(batch_size: int, devices: int) -> list[int]:
    """The next smaller and larger batch size that `devices` divide; none is 0."""
    below = batch_size // devices * devices
    return [size for size in (below, below + devices) if size]
