"""Errors that the user can fix: each message names the value, the limit and the remedy.

Commands print them as one line and exit with status 1. Any other exception is a bug in
pspnet_jax and keeps its traceback.
"""

from collections.abc import Sequence

LONGEST = 4000  # characters of a line; a message may quote an untrusted file


class PspnetError(ValueError):
    """An input that can't be used: one line, plus one for each of `faults`.

    Control characters are escaped, so quoted text can't add lines or control the terminal.
    """

    def __init__(self, message: str, faults: Sequence[str] = ()):
        super().__init__(message, tuple(faults))

    @property
    def faults(self) -> tuple[str, ...]:
        return self.args[1]

    def __str__(self) -> str:
        return '\n  '.join(map(one_line, (self.args[0], *self.faults)))


def one_line(text: str) -> str:
    """Escape unprintable characters, and shorten a long text to its start and end."""
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
    """Print one line with unprintable characters escaped, since it may quote untrusted names."""
    print(one_line(line))


def first_line(error: Exception) -> str:
    """The first line of an error, at most 400 characters; its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]


class ConfigError(PspnetError):
    """An unknown key, a missing one, or a value that isn't allowed."""


class DataError(PspnetError):
    """A data set or image that is missing, corrupted or inconsistent."""


class CheckpointError(PspnetError):
    """There is no checkpoint, all are corrupted, or it belongs to another model."""


class NoRoomError(DataError):
    """An image that needs more memory than is free now."""


class PretrainedError(PspnetError):
    """A weight file that can't be read or does not fit."""


class NonFiniteLossError(PspnetError):
    """Loss or gradient became NaN or infinite."""


class OutOfMemoryError(PspnetError):
    """The device's memory is too small for the program."""


class LogError(PspnetError):
    """The run's logs can't be written."""


class StoppedError(PspnetError):
    """A signal stopped the run after it wrote a checkpoint."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class HostError(PspnetError):
    """The processes of one run do not find, or no longer reach, each other."""


class ExportError(PspnetError):
    """An exported file that can't be read back or does not compute what the model does."""


def all_faults(source: object, faults: Sequence[str], most: int = 1000) -> DataError:
    """One DataError that lists at most `most` of the faults."""
    more = [f'and {len(faults) - most} more'] * (len(faults) > most)
    return DataError(f'{len(faults)} fault(s) in {source}:', [*faults[:most], *more])


def not_written(path: object, reason: object) -> str:
    """The message for a file or folder that can't be written; `reason` is an OSError or a text."""
    words = getattr(reason, 'strerror', None) or reason
    return f'{path} can not be written ({words}): free some space or give another folder'
