"""Atomic file writes: each file is written under a temporary name and renamed at the end."""

import contextlib
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pspnet_jax.runtime.errors import DataError, not_written

_HOST = re.sub('[^A-Za-z0-9-]', '-', socket.gethostname())[:40]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` at the end; after an error it is removed.

    Its name is unique, so two processes may write the same `path`. `sweep` removes the temporary
    files of killed processes.
    """
    aside = path.with_name(f'.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(not_written(path, error)) from error
        raise


def write_json(path: Path, tree: Any) -> None:
    """Write JSON atomically. Raises ValueError for NaN, which JSON does not have."""
    with writing(path) as aside:
        aside.write_text(json.dumps(tree, indent=1, allow_nan=False) + '\n')


def sweep(folder: Path) -> None:
    """Remove the temporary files in a folder whose process was killed on this machine."""
    for path in folder.rglob(f'.{_HOST}.*.*.tmp'):
        try:
            os.kill(int(path.name.split('.')[2]), 0)
        except (ProcessLookupError, ValueError, OverflowError):
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:  # another user's process
            pass
