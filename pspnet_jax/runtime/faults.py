"""What reaches a run from outside: signals, a second run on its folder, memory that is too small.

Each is a context manager around the loop, so that the loop reads as if nothing ever happened.
"""

import contextlib
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
from jax.experimental.multihost_utils import reached_preemption_sync_point

from pspnet_jax.runtime.errors import ConfigError, OutOfMemoryError, not_written
from pspnet_jax.runtime.text import NOTE, read_json

logger = logging.getLogger(__name__)

LOCK = 'lock'  # in the workdir
STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def alone(workdir: str | Path) -> Iterator[None]:
    """Hold WORKDIR/lock, so that no two runs write there.

    The system lets go of it when the process ends, however it ends: a stale one is no hindrance.
    Raises ConfigError that names the other run and its age.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = Path(workdir) / LOCK
    while True:
        # Never what a link leads to, nor a pipe: it is emptied and written to.
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise ConfigError(f'{path} is no file but a link or device: remove it')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open('a+')
        except OSError as error:
            raise ConfigError(not_written(path, error)) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f'{workdir} is in use{_owner(path)}: wait, stop it, or give another --workdir'
                ) from error
            except OSError as error:  # Lustre or NFS without locks
                logger.warning(
                    '%s can not be locked (%s): take care that no other run uses this workdir',
                    path,
                    error.strerror,
                )
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # its owner has just removed it
            if before := _owner(path):
                logger.info('the run before, begun%s, was cut off', before)
            owner = {'process': os.getpid(), 'host': socket.gethostname(), 'since': time.time()}
            with contextlib.suppress(OSError):  # a full disk: it is locked all the same
                os.truncate(path, 0)
                os.write(file.fileno(), json.dumps(owner).encode())
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # read-only by now; or something came of it
                    path.unlink(missing_ok=True)
                    path.parent.rmdir()
            return


def _owner(path: Path) -> str:
    """' by process 7 on HOST for 3.2 minutes', or '' where the file does not say."""
    try:
        owner = read_json(path, most=NOTE)
        minutes = (time.time() - float(owner['since'])) / 60
        process, host = int(owner['process']), str(owner['host'])[:64]
        if not host.isprintable() or abs(process) > 2**62:
            return ''
        return f' by process {process} on {host} for {minutes:.1f} minutes'
    except (ValueError, KeyError, TypeError, OverflowError):
        return ''


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """A function that gives the number of the signal that asks to stop, 0 while there is none.

    The first SIGTERM or SIGINT only asks; a second one does what it always did. In a thread
    other than the main one, where Python takes no handlers, none is ever seen.

    On several hosts all see it behind the same step, whichever of them it reached, if all ask
    behind every step: JAX takes SIGTERM there and lets them agree.
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
        logger.warning('%s: stopping behind the next step', signal.Signals(signum).name)

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
    """XLA's report that memory is exhausted becomes an OutOfMemoryError.

    `what()` says what was asked for and which knobs make it less.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in text:
            raise
        asked = re.search(r'allocat\w* (\d+) ?bytes', text)
        more = f' (the last {int(asked[1]) / 2**20:.0f} MB were refused)' if asked else ''
        raise OutOfMemoryError(f'out of memory{more}: {what()}') from error


def device_memory() -> str:
    """', the device has N MB', or '' where it does not say, as CPUs don't."""
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get('bytes_limit')
    return f', the device has {limit / 2**20:.0f} MB' if limit else ''
