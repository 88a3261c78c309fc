"""What a run writes down: metrics.jsonl, and the same to TensorBoard."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 100_000  # characters of a line
FURTHEST = 1e39  # of a figure: float32 holds no more


class MetricLog:
    """Appends to WORKDIR/metrics.jsonl, one line a record, and to TensorBoard.

    Lines after `first_step` are of a run that was stopped and is now run again from
    there: they are cut off, so each step stands there once. `each(step, values)` is
    called with every record that was written.
    """

    def __init__(
        self,
        workdir: str | Path,
        first_step: int,
        each: Callable[[int, dict[str, float | None]], object] = lambda step, values: None,
    ):
        # Here, since it imports PyTorch where that is installed.
        from tensorboardX import SummaryWriter

        path = Path(workdir) / 'metrics.jsonl'
        if os.path.lexists(path):
            kept = [line for line, record in _records(path) if record['step'] <= first_step]
            aside = path.with_suffix('.tmp')
            aside.unlink(missing_ok=True)  # of a killed run, or a link elsewhere
            aside.write_text(''.join(f'{line}\n' for line in kept))
            os.replace(aside, path)
        self._file, self._each = path.open('a'), each
        self._board = SummaryWriter(str(Path(workdir) / 'tensorboard'), purge_step=first_step + 1)

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """One record; None where a figure is undefined."""
        self._file.write(json.dumps({'step': step, **values}, allow_nan=False) + '\n')
        self._file.flush()
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        self._each(step, values)

    def timings(self, step: int, values: dict[str, float]) -> None:
        """TensorBoard only: they differ from run to run, so metrics.jsonl leaves them out."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """A uint8 RGB picture, TensorBoard only."""
        self._board.add_image(name, picture_HWC, step, dataformats='HWC')

    def close(self) -> None:
        self._file.close()
        self._board.close()


class Silent:
    """In place of `MetricLog` on all hosts but the first."""

    def scalars(self, *_) -> None: ...

    def timings(self, *_) -> None: ...

    def image(self, *_) -> None: ...

    def close(self) -> None: ...


def read(workdir: str | Path) -> list[dict[str, float | None]]:
    """The records of WORKDIR/metrics.jsonl, in order; none where there is no such file."""
    return [record for _, record in _records(Path(workdir) / 'metrics.jsonl')]


def _records(path: Path) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Lines that are records: a killed process may have left half a line at the end."""
    if not path.is_file():
        return
    with path.open(encoding='utf-8', errors='replace') as file:
        for line in iter(lambda: file.readline(LONGEST), ''):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_record(record):
                yield line.strip(), record


def _is_record(found: Any) -> bool:
    if not isinstance(found, dict) or type(found.get('step')) is not int:
        return False
    numbers = [x for x in found.values() if x is not None]
    sound = all(type(x) in (int, float) and abs(x) <= FURTHEST for x in numbers)
    return sound and 0 <= found['step'] < 2**31
