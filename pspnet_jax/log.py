"""What a run writes down: metrics.jsonl, and the same to TensorBoard."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np


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
        if path.exists():
            kept = [line for line in _whole_lines(path) if json.loads(line)['step'] <= first_step]
            aside = path.with_suffix('.tmp')
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
    path = Path(workdir) / 'metrics.jsonl'
    records = map(json.loads, _whole_lines(path)) if path.exists() else ()
    return [record for record in records if isinstance(record, dict) and 'step' in record]


def _whole_lines(path: Path) -> list[str]:
    """Lines that parse: a killed process may have left half a line at the end."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            json.loads(line)
        except json.JSONDecodeError:
            continue
        lines.append(line)
    return lines
