"""Files that are whole or not there: each is written aside and takes its name at the end."""

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
    """A file beside `path` that takes its place at the end; after an error nothing is left.

    It has a name of its own, so that two processes may write the same `path`; `sweep` removes those
    of processes that were killed.
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
    """By `writing`. Raises ValueError for NaN, which JSON has not."""
    with writing(path) as aside:
        aside.write_text(json.dumps(tree, indent=1, allow_nan=False) + '\n')


def sweep(folder: Path) -> None:
    """Remove what `writing` left below a folder when its process was killed on this machine."""
    for path in folder.rglob(f'.{_HOST}.*.*.tmp'):
        try:
            os.kill(int(path.name.split('.')[2]), 0)
        except (ProcessLookupError, ValueError, OverflowError):
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:  # another user's
            pass
