"""The manifest of a folder of predictions: from which files, by which run, with which options.

FOLDER/pspnet_predictions.jsonl has a line that describes the run and its options, and two for each
file: one before its results are written, one after. With it an interrupted command resumes, and
files that `predict` did not write are recognised.
"""

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pspnet_jax.runtime.errors import DataError, not_written
from pspnet_jax.runtime.text import parse_json

NAME = 'pspnet_predictions.jsonl'


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A manifest's lines, by the stem of each result's files.

    `last` has the last line of each result, `kinds` all kinds that were begun for it, `writers`
    {digest: description of the run}. `digest` is that of the current command.
    """

    path: Path
    digest: str
    last: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    kinds: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    writers: dict[str, str] = dataclasses.field(default_factory=dict)


def read(folder: Path, options: Mapping[str, Any], process: int = 0) -> Manifest:
    """The manifest of a folder, which need not exist yet.

    `options` are all that the results depend on. Each process appends to a file of its own.
    """
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]
    found = Manifest(folder / (NAME.replace('.', f'.{process}.') if process else NAME), digest)
    for path in sorted(folder.glob(NAME.replace('.', '*.'))):
        for line in _lines(path):
            if 'writer' in line:
                found.writers[line['how']] = line['writer']
            else:
                found.last[line['result']] = line
                found.kinds.setdefault(line['result'], set()).update(line['kinds'])
    return found


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """The valid lines: a crash may have cut the last one."""
    try:
        text = path.read_text('utf-8', errors='replace')
    except OSError as error:
        raise DataError(
            f'{path} can not be read ({error.strerror}): check its permissions'
        ) from error
    for row in text.splitlines():
        try:
            line = parse_json(row)
            keys = ('writer',) if 'writer' in line else ('result', 'input', 'mark', 'state')
            sound = all(isinstance(line[key], str) for key in ('how', *keys))
            sound &= all(isinstance(kind, str) for kind in line.get('kinds', ['']))
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
        if sound:
            yield line


def begin(manifest: Manifest, writer: str, about: Mapping[str, Any]) -> None:
    """Append who writes from here on: a description and all details. Raises DataError."""
    known = manifest.digest in manifest.writers
    line = {'how': manifest.digest, 'writer': writer, **about}
    try:
        manifest.path.parent.mkdir(parents=True, exist_ok=True)
        with open(manifest.path, 'ab+') as file:
            file.seek(max(file.tell() - 1, 0))
            cut = file.read(1) not in (b'', b'\n')  # after a crash or on a full disk
            file.write(b'\n' * cut + (b'' if known else json.dumps(line).encode() + b'\n'))
    except OSError as error:
        raise DataError(not_written(manifest.path, error)) from error


def add(
    manifest: Manifest,
    state: str,
    result: str,
    *,
    source: str | Path,
    mark: str,
    kinds: Sequence[str],
) -> None:
    """Append that a result is 'begun' or 'done'. Raises DataError."""
    line = {'result': result, 'state': state, 'input': str(source), 'mark': mark}
    line |= {'kinds': list(kinds), 'how': manifest.digest}
    try:  # unbuffered, so that lines of other processes do not mix with it
        with open(manifest.path, 'ab', buffering=0) as file:
            data = json.dumps(line).encode() + b'\n'
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise DataError(not_written(manifest.path, error)) from error


def mark_of(paths: Iterable[Path]) -> str:
    """Sizes and modification times of files, and of all files in a folder."""
    parts = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        parts += [f'{each.stat().st_size}.{each.stat().st_mtime_ns}' for each in inside]
    text = ' '.join(parts)
    return text if len(parts) < 3 else hashlib.sha256(text.encode()).hexdigest()[:16]


def sort_out(
    manifest: Manifest, result: str, source: Path, mark: str, wanted: Collection[str],
    there: Collection[str],
) -> tuple[bool, str]:  # fmt: skip
    """(whether the result is finished, why it may not be written or '').

    `wanted` are the kinds to write, `there` those of them whose file exists.
    """
    here, last = manifest.path.parent / result, manifest.last.get(result)
    if foreign := set(there) - manifest.kinds.get(result, set()):
        return False, f'{here}_{min(foreign)}... was not written by this command'
    if not there:
        return False, ''
    if last['how'] != manifest.digest:
        writer = manifest.writers.get(last['how'], 'another run')
        return False, f'{here}_{min(there)}... was written by {writer}'
    if last['mark'] == mark:
        whole = last['state'] == 'done' and set(wanted) <= {*there} & {*last['kinds']}
        return whole, ''
    if last['input'] != str(source):
        return False, f'{here}_{min(there)}... is the result of {last["input"]}, not of {source}'
    return False, ''
