"""Outside events that a run must handle: signals, a second run in its folder, too little memory.

Each has a context manager around the training loop, so the loop itself does not handle them.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout
from jax.experimental.multihost_utils import reached_preemption_sync_point

from pspnet_jax.runtime import checkpoint
from pspnet_jax.runtime.errors import ConfigError, OutOfMemoryError, not_written
from pspnet_jax.runtime.text import NOTE, read_json

logger = logging.getLogger(__name__)

LOCK = 'lock'  # in the workdir
# Errors of flock on file systems without locks, such as Lustre and some NFS.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def locked(workdir: str | Path) -> Iterator[None]:
    """Hold WORKDIR/lock, so that no two runs write there.

    The system releases the lock when the process ends, however it ends. A stale lock file is
    harmless: it shows that the previous run was interrupted. Raises ConfigError that names the
    other run.
    """
    path = Path(workdir) / LOCK
    # The file is emptied and written to, so it must not be a link or a pipe.
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise ConfigError(f'{path} is a link or device, not a file: remove it')

    def sign(file: int) -> None:
        if before := _owner(path):
            resumes = 'resuming' if checkpoint.steps(workdir) else 'starting again'
            logger.info('%s: the previous run (%s) was interrupted', resumes, before)
        owner = {'process': os.getpid(), 'host': socket.gethostname(), 'since': time.time()}
        with contextlib.suppress(OSError):  # on a full disk the lock still holds
            os.ftruncate(file, 0)
            os.write(file, json.dumps(owner).encode())

    lock = FileLock(path, blocking=False, fallback_to_soft=False, on_acquired=sign)
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock)
        except Timeout as error:
            owner = _owner(path) or 'another process'
            raise ConfigError(
                f'{workdir} is in use by {owner}: wait, stop it, or give another --workdir'
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise ConfigError(not_written(path, error)) from error
            logger.warning(
                '%s can not be locked (%s): make sure that no other run uses this workdir',
                path,
                error.strerror,
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # read-only by now, or the folder is not empty
                path.unlink(missing_ok=True)
                path.parent.rmdir()


def _owner(path: Path) -> str:
    """'process 7 on HOST, 3.2 minutes', or '' if the file does not hold that."""
    try:
        owner = read_json(path, most=NOTE)
        minutes = (time.time() - float(owner['since'])) / 60
        process, host = int(owner['process']), str(owner['host'])[:64]
        if not host.isprintable() or abs(process) > 2**62:
            return ''
        return f'process {process} on {host}, {minutes:.1f} minutes'
    except (ValueError, KeyError, TypeError, OverflowError):
        return ''


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """A function that returns the number of the signal that asked to stop, or 0.

    The first SIGTERM or SIGINT only asks to stop; a second one has its usual effect. Python takes
    handlers only in the main thread: in other threads the function always returns 0.

    On several hosts, call it after every step: JAX handles SIGTERM there, and all hosts see the
    signal after the same step, whichever of them received it.
    """
    if jax.process_count() > 1:
        calls = itertools.count()
        with _as_sigterm(signal.SIGINT):
            yield lambda: signal.SIGTERM * reached_preemption_sync_point(next(calls))
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    found = []

    def ask(signum, _):
        found.append(signum)
        for number, handler in before.items():
            signal.signal(number, handler)
        logger.warning('%s: stopping after the next step', signal.Signals(signum).name)

    before = {number: signal.signal(number, ask) for number in STOPPING}
    try:
        yield lambda: found[0] if found else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _as_sigterm(number: int) -> Iterator[None]:
    before = signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def memory_explained(what: Callable[[], str]) -> Iterator[None]:
    """Turn XLA's out-of-memory error into an OutOfMemoryError.

    `what()` returns what needed the memory and which options reduce it.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in text:
            raise
        asked = re.search(r'allocat\w* (\d+) ?bytes', text)
        more = f' (asking for {int(asked[1]) / 2**20:.0f} MB more)' if asked else ''
        raise OutOfMemoryError(f'out of memory{more}: {what()}') from error


def device_memory() -> str:
    """', the device has N MB', or '' if it does not report that, as CPUs don't."""
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get('bytes_limit')
    return f', the device has {limit / 2**20:.0f} MB' if limit else ''
