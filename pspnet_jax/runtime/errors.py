"""What can be wrong from outside: each message names the value, the limit and the remedy.

Commands print these as one line and exit with status 1; anything else is a bug in
pspnet_jax and keeps its traceback.
"""

from collections.abc import Sequence

LONGEST = 4000  # characters of a line; a message quotes what an untrusted file says


class PspnetError(ValueError):
    """An input that can't be used as it is: one line, and one more for each of `faults`.

    What a message quotes can't add a line, nor steer a terminal: such characters are escaped.
    """

    def __init__(self, message: str, faults: Sequence[str] = ()):
        super().__init__(message, tuple(faults))

    @property
    def faults(self) -> tuple[str, ...]:
        return self.args[1]

    def __str__(self) -> str:
        return '\n  '.join(map(one_line, (self.args[0], *self.faults)))


def one_line(text: str) -> str:
    """Printable; of what is too long the start and the end."""
    if len(text) > LONGEST:
        text = f'{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}'
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
    return ''.join(escaped)


def some(items: Sequence[object], most: int = 8, separator: str = ', ') -> str:
    """'a, b and 3 more'."""
    more = f' and {len(items) - most} more' * (len(items) > most)
    return separator.join(map(str, items[:most])) + more


def say(line: str) -> None:
    """Print a line that quotes a name: it can neither add another nor steer the terminal."""
    print(one_line(line))


def first_line(error: Exception) -> str:
    """The reason a library gives, cut where it is long; the type of an error without words."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]


class ConfigError(PspnetError):
    """A key that nothing reads, one that is missing, or a value that isn't allowed."""


class DataError(PspnetError):
    """A data set or picture that is missing, corrupted or inconsistent."""


class CheckpointError(PspnetError):
    """No checkpoint, only corrupted ones, or one of another model."""


class NoRoomError(DataError):
    """A picture that needs more memory than is free now."""


class PretrainedError(PspnetError):
    """A weight file that can't be read or does not fit."""


class NonFiniteLossError(PspnetError):
    """Loss or gradient became NaN or infinite."""


class OutOfMemoryError(PspnetError):
    """The device's memory is too small for the program."""


class LogError(PspnetError):
    """The run's own records can't be written."""


class StoppedError(PspnetError):
    """A signal asked the run to stop, which it did after a checkpoint."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class HostError(PspnetError):
    """Processes of one run that do not find or no longer reach each other."""


class ExportError(PspnetError):
    """An exported file that would not compute what the model does, or can't be read back."""


def all_faults(source: object, faults: Sequence[str], most: int = 1000) -> DataError:
    """A list of them, cut where it is long."""
    more = [f'and {len(faults) - most} more'] * (len(faults) > most)
    return DataError(f'{len(faults)} fault(s) in {source}:', [*faults[:most], *more])


def not_written(path: object, reason: object) -> str:
    """The message for a file or folder that `reason`, an OSError or words, keeps from the disk."""
    words = getattr(reason, 'strerror', None) or reason
    return f'{path} can not be written ({words}): free some space or give another folder'
