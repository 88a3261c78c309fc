"""Several processes as one run: how they start, divide the work, gather results and stop.

Give the same command on every host with --coordinator, --num_processes and --process_id; on Slurm,
a TPU pod or Open MPI these are found automatically. A single process uses none of this.
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

START_SECONDS = 300  # how long processes wait for each other at the start
END_SECONDS = 3600  # and at the end, while the first one writes the report
LAST_SECONDS = 1  # from an error in one of several processes to its exit
NOT_TOGETHER = (
    'error: the processes did not connect within {} s: start them all, with the same --coordinator'
)
ENDED = (
    'error: process {} of {} ended before its work was done, or another one stopped answering '
    '(--host_timeout={} s): the first error of all processes tells why. Start all again: the run '
    'resumes from its last checkpoint'
)


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Join the other processes; call it before anything touches a device.

    Without arguments, `jax.distributed` finds the processes of Slurm, a TPU pod or Open MPI; a
    single process needs nothing. Raises ConfigError if only some of the three are given. If the
    others do not connect, JAX's runtime ends the process and NOT_TOGETHER is printed.
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
            raise ConfigError(f'--coordinator={coordinator} is not the HOST:PORT of process 0')
        if not 0 <= process_id < num_processes:
            raise ConfigError(
                f'--process_id={process_id} is not one of 0 to {num_processes - 1}: '
                f'--num_processes is {num_processes}'
            )
        if num_processes == 1:
            return
        _watch()
        jax.distributed.initialize(*given, cluster_detection_method='deactivate', **options)
    _say_at_an_abort(ENDED.format(jax.process_index(), jax.process_count(), timeout))


def find_cluster(environment: Mapping[str, str]) -> str | None:
    """What starts several processes here: 'slurm', 'ompi', 'tpu' or None.

    It touches no device, so 'tpu' is a guess. A single task of Slurm or Open MPI is no cluster.
    """
    slurm = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_PROCID', 'SLURM_LOCALID')
    if all(name in environment for name in slurm):
        return 'slurm' if int(environment.get('SLURM_NTASKS', 1)) > 1 else None
    if 'OMPI_COMM_WORLD_SIZE' in environment:
        return 'ompi' if int(environment['OMPI_COMM_WORLD_SIZE']) > 1 else None
    tpu = 'tpu' in environment.get('JAX_PLATFORMS', 'tpu')
    return 'tpu' if tpu and importlib.util.find_spec('libtpu') else None


def _watch() -> None:
    """Start a shell that prints a last line if this process aborts before Python exits.

    JAX's runtime aborts the process when another one is silent for --host_timeout, or at once when
    process 0 is gone. The process itself can't print anything then.
    """
    global _watcher
    script = (
        'while IFS= read -r line; do last=$line; done; '
        '[ "$last" = done ] || printf "%s\\n" "$last" >&2'
    )
    _watcher = subprocess.Popen(['sh', '-c', script], stdin=subprocess.PIPE, start_new_session=True)
    # Exit handlers run last to first: this one runs after JAX's, which waits for the others.
    atexit.register(_watch_no_more)
    _say_at_an_abort(NOT_TOGETHER.format(START_SECONDS))


def _say_at_an_abort(words: str) -> None:
    """Send the shell one line, which replaces the previous one."""
    line = words.replace('\n', ' ').encode(errors='backslashreplace')
    if _watcher and _watcher.stdin:
        with contextlib.suppress(BrokenPipeError):  # the shell was killed
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
    """Whether the error means that a process which a collective or Orbax waits for is gone."""
    words = ('gloo', 'nccl', 'connection', 'coordination', 'heartbeat', 'deadline', 'unavailable')
    text = str(error).lower()
    told = isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in words)
    return several() and (told or isinstance(error, TimeoutError))


def lost() -> HostError:
    """The error for `lost_another`."""
    return HostError(
        f'process {jax.process_index()} of {jax.process_count()} has lost another: the first error '
        'of all processes tells why. Start all again: the run resumes from its last checkpoint'
    )


def leave_after_an_error(words: str = '') -> NoReturn:
    """Print `words` to stderr and exit with status 1; the other processes then stop too.

    A normal exit would wait for the other processes, which wait for this one, and for threads: a
    save to a disk that became read-only takes minutes to end.
    """
    if several() and words:
        # JAX's runtime may abort this process for the same reason and print all stacks: the shell
        # then prints the reason after them.
        _say_at_an_abort(words)
    with contextlib.suppress(OSError):  # the reader of the pipe is gone
        if words:
            print(words, file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
    if several():
        time.sleep(LAST_SECONDS)  # so that the stacks are complete and come first
        _watch_no_more()
    os._exit(1)


def is_first() -> bool:
    """Whether this process writes logs and reports."""
    return jax.process_index() == 0


def share(items: Sequence[Any]) -> list[Any]:
    """This process's share of `items`: every n-th of them, for n processes."""
    return list(items[jax.process_index() :: jax.process_count()])


def gather(rows: Sequence[Any]) -> list[Any]:
    """Return the rows of all processes on each of them, in the order of the processes.

    Rows are JSON values. All processes must call it together.
    """
    if jax.process_count() == 1:
        return list(rows)
    text = np.frombuffer(json.dumps(list(rows)).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32)).ravel()
    texts = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - len(text))))
    parts = zip(texts, sizes, strict=True)
    return [row for text, size in parts for row in json.loads(text[:size].tobytes())]


def wait_for_all() -> None:
    """Return once all processes have called it."""
    gather([])


def check_same(facts: Mapping[str, Any]) -> None:
    """Raise HostError on every process if a leaf of `facts` (JSON values) differs between them."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(facts))
    ours = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
    first, *others = gather([ours])
    for n, theirs in enumerate(others, 1):
        for name in sorted(first.keys() | theirs.keys()):
            here, there = first.get(name), theirs.get(name)
            if here != there:
                raise HostError(
                    f'{name} is {here!r} in process 0 and {there!r} in process {n}: give all the '
                    'same command, and a --workdir that all of them share'
                )


def nearest_batches(batch_size: int, devices: int) -> list[int]:
    """The next smaller and larger multiples of `devices`; 0 is left out."""
    below = batch_size // devices * devices
    return [size for size in (below, below + devices) if size]
