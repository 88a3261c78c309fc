"""What a run prints: its settings, its progress, and the time that is left."""

import dataclasses
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from pspnet_jax import models
from pspnet_jax.config import base, flatten
from pspnet_jax.data import volumes

logger = logging.getLogger(__name__)

LINE_SECONDS = 60.0  # between two lines if stderr is not a terminal
TIMED = 3  # updates before the first estimate


def tell_config(config: ConfigDict, workdir: str) -> None:
    """Log one line with what differs from the defaults, without None: that is left to the data."""
    defaults = flatten(base.get_config().to_dict())
    values = flatten(config.to_dict())
    changed = [
        f'{key}={value}'
        for key, value in values.items()
        if value is not None and value != defaults.get(key)
    ]
    listed, path = ', '.join(changed) or 'all defaults', Path(workdir) / 'config.json'
    logger.info('config: %s (full config in %s)', listed, path)


def tell_data(split: Mapping[str, volumes.Slices]) -> None:
    """Log one line with what each part holds."""
    told = (f'{name} {volumes.describe(part)}' for name, part in split.items())
    logger.info('data: %s', '; '.join(told))


def tell_network(config: ConfigDict, size: int, seconds: float) -> None:
    """Log one line: `size` parameters, and the `seconds` of compiling the training step."""
    _, backbone, _ = models.resolve(**config.model)
    logger.info(
        'network: %s%s, %d classes, %s parameters; compiled in %.0f s',
        config.model.name,
        f' on {backbone}' if backbone else '',
        config.model.num_classes,
        f'{size:,}',
        seconds,
    )


def tell_plan(config: ConfigDict, slices: int, total: int, validate_every: int) -> None:
    """Log one line; the duration is not known yet."""
    epochs = total * config.train.batch_size / slices
    logger.info(
        'plan: %d steps of %d images, %s epochs, validation every %d steps',
        total,
        config.train.batch_size,
        _digits(epochs),
        min(validate_every, total),
    )


def _digits(x: float) -> str:
    """'0.384', '57.1', '14,286': three digits, or all digits before the point."""
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def duration(seconds: float) -> str:
    """'42 s', '12 minutes', '3.4 hours'."""
    if seconds < 99.5:
        return f'{seconds:.0f} s'
    if seconds < 5970:
        return f'{seconds / 60:.0f} minutes'
    return f'{seconds / 3600:.1f} hours'


@dataclasses.dataclass
class Pace:
    """Times updates and validations in this process, and estimates how long the rest takes.

    Compilation is not counted.
    """

    total: int
    validate_every: int
    step: int  # the last that is finished
    clock: Callable[[], float] = time.perf_counter
    updates: int = 0
    seconds: float = 0.0  # for these
    validations: int = 0
    validating: float = 0.0  # seconds

    def __post_init__(self) -> None:
        self.since = self.clock()

    def finish(self, step: int) -> None:
        """Record that all updates up to `step` are finished now."""
        now = self.clock()
        self.updates, self.seconds = (
            self.updates + step - self.step,
            self.seconds + now - self.since,
        )
        self.step, self.since = step, now

    def finish_validation(self) -> None:
        now = self.clock()
        self.validations, self.validating = self.validations + 1, self.validating + now - self.since
        self.since = now

    def skip(self, step: int) -> None:
        """Leave out the time since the last call, and the updates up to `step`."""
        self.step, self.since = step, self.clock()

    def left(self) -> float:
        """Seconds to the end of training; NaN before an update was timed.

        They include validations once one was timed; the last step is always validated.
        """
        if not self.updates:
            return math.nan
        to_come = -(-self.total // self.validate_every) - self.step // self.validate_every
        each = self.validating / self.validations if self.validations else 0.0
        return (self.total - self.step) * self.seconds / self.updates + to_come * each


class Progress:
    """A progress bar on a terminal, elsewhere one line per minute: loss, speed and time left.

    A context manager, which closes the bar at the end.
    """

    def __init__(self, pace: Pace, batch_size: int):
        self.pace, self._batch_size = pace, batch_size
        self._told = None  # time of the last line
        columns, rows = shutil.get_terminal_size()  # never 0, as docker's terminals are at first
        self._bar = tqdm(
            total=pace.total,
            initial=pace.step,
            bar_format='{percentage:3.0f}% |{bar}| step {n_fmt} of {total_fmt}{postfix}',
            ncols=columns,
            nrows=rows,
            mininterval=1,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def update(self, step: int, loss: float) -> None:
        """The updates up to `step` are finished; `loss` is the last one's."""
        pace = self.pace
        pace.finish(step)
        if pace.updates >= TIMED and self._told is None:
            logger.info(
                'time: %s left, %.2g s per step%s',
                self.left(),
                pace.seconds / pace.updates,
                '' if pace.validations else ', without validations',
            )
            self._told = pace.since
        if self._told is not None:
            speed = pace.updates * self._batch_size / pace.seconds
            told = f'loss {loss:.4f}, {_digits(speed)} images/s, {self.left()} left'
            self._bar.set_postfix_str(told, refresh=False)
            if self._bar.disable and pace.since - self._told >= LINE_SECONDS:
                logger.info('step %d of %d: %s', step, pace.total, told)
                self._told = pace.since
        self._bar.update(step - self._bar.n)

    def tell_validation(self, step: int, dice: float, progress: Mapping[str, Any]) -> None:
        """Log one line; `progress` is the checkpoint's, `dice` is -1 if it is undefined."""
        best, at = f'best {progress["best_dice"]:.4f}', progress.get('best_step')
        if at is not None:  # older checkpoints do not have it
            best = 'the best so far' if at == step else f'{best} at step {at}'
        self.pace.finish_validation()
        found = f'{dice:.4f}, {best}' if dice >= 0 else 'undefined: no case has a structure'
        left = '' if step == self.pace.total else f'; {self.left()} left'
        logger.info('step %d of %d: validation Dice %s%s', step, self.pace.total, found, left)

    def left(self) -> str:
        """The time left as text; unknown before an update was timed."""
        seconds = self.pace.left()
        return 'an unknown time' if math.isnan(seconds) else duration(seconds)
