"""The metrics of a run: metrics.jsonl and TensorBoard."""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pspnet_jax.runtime.errors import DataError, LogError, not_written
from pspnet_jax.runtime.text import parse_json

logger = logging.getLogger(__name__)

LONGEST = 100_000  # characters of a line
FURTHEST = 1e39  # largest value of a metric: float32 holds no more


class MetricLog:
    """Appends records to WORKDIR/metrics.jsonl, one per line, and to TensorBoard.

    When a stopped run resumes at `first_step`, later lines are removed, so each step is there
    once. `each(step, values)` is called after every record. Raises LogError if the disk is full
    or read-only; metrics.jsonl then still holds whole lines only.
    """

    def __init__(
        self,
        workdir: str | Path,
        first_step: int,
        each: Callable[[int, dict[str, float | None]], object] = lambda step, values: None,
    ):
        # Imported here, since it imports PyTorch where that is installed.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._path, self._each = Path(workdir) / 'metrics.jsonl', each
        self._event, self._summary = Event, summary
        with _explained(self._path):
            if os.path.lexists(self._path):
                kept = [x for x, record in _records(self._path) if record['step'] <= first_step]
                aside = self._path.with_suffix('.tmp')
                try:
                    aside.unlink(missing_ok=True)  # left by a killed run, or a link elsewhere
                    aside.write_text(''.join(f'{line}\n' for line in kept))
                    os.replace(aside, self._path)
                finally:
                    aside.unlink(missing_ok=True)
            self._file = self._path.open('ab', buffering=0)
            folder = self._path.with_name('tensorboard')
            folder.mkdir(exist_ok=True)
            # Not SummaryWriter: on a full disk its thread dies and the run waits for it for ever.
            self._board = EventsWriter(str(folder / 'events'))
            for fact in (
                {'file_version': 'brain.Event:2'},
                {'session_log': SessionLog(status=SessionLog.START)},  # discards later steps
            ):
                self._board.write_event(Event(step=first_step + 1, **fact))

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Write one record; None means that a metric is undefined."""
        line = json.dumps({'step': step, **values}, allow_nan=False).encode() + b'\n'
        with _explained(self._path):
            end = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._file.truncate(end)
                raise
        self.timings(step, {name: value for name, value in values.items() if value is not None})
        self._each(step, values)

    def timings(self, step: int, values: dict[str, float]) -> None:
        """Write to TensorBoard only: timings differ between runs, so metrics.jsonl omits them."""
        for name, value in values.items():
            self._show(step, self._summary.scalar(name, value))

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """Write a uint8 RGB image, to TensorBoard only."""
        self._show(step, self._summary.image(name, picture_HWC, dataformats='HWC'))

    def _show(self, step: int, summary) -> None:
        with _explained(self._path.with_name('tensorboard')):
            self._board.write_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Flush to disk. Call it before a checkpoint, whose steps must all be in the log."""
        with _explained(self._path):
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        with _explained(self._path.with_name('tensorboard')):
            self._board.close()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogError(not_written(path, error)) from error


class Silent:
    """Replaces `MetricLog` on all hosts but the first."""

    def scalars(self, *_) -> None: ...

    def timings(self, *_) -> None: ...

    def image(self, *_) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def read(workdir: str | Path) -> list[dict[str, float | None]]:
    """The records of WORKDIR/metrics.jsonl, in order; an empty list without that file."""
    return [record for _, record in _records(Path(workdir) / 'metrics.jsonl')]


def _records(path: Path) -> Iterator[tuple[str, dict[str, float | None]]]:
    """(line, record) of each valid line: a killed process may have left half a line at the end."""
    if not path.is_file():
        return
    damaged = []
    with path.open(encoding='utf-8', errors='replace') as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), ''), start=1):
            record = None
            with contextlib.suppress(DataError):
                record = parse_json(line)
            if _is_record(record):
                yield line.strip(), record
            else:
                damaged.append(number)
    if damaged:
        logger.warning(
            '%s: %d line(s) are corrupted and ignored, the first is line %d',
            path,
            len(damaged),
            damaged[0],
        )


def _is_record(found: Any) -> bool:
    if not isinstance(found, dict) or type(found.get('step')) is not int:
        return False
    numbers = [x for x in found.values() if x is not None]
    sound = all(type(x) in (int, float) and abs(x) <= FURTHEST for x in numbers)
    return sound and 0 <= found['step'] < 2**31
