"""How every command starts: flags are parsed, a line names the devices, errors are one line and
exit status 1. What a command compiles is kept for the next.
"""

import logging
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from pspnet_jax import compilation, devices, hosts
from pspnet_jax.config import RULES
from pspnet_jax.config.flags import prepare
from pspnet_jax.errors import ConfigError, DataError, PspnetError, StoppedError, one_line

logger = logging.getLogger(__name__)

GROUP = (
    "the patient in a file's name, as data.group; '': each file is by itself; without: as the run"
)
# The packages whose INFO is printed: ours, and a command's own module.
OURS = ('pspnet_jax', 'experiments', '__main__')
# Of all others it is WARNING and above, but for these. Orbax, tfds and Grain log their inner
# workings by absl's logger, and what they raise at length before they raise it, asyncio too.
LEAST = {'absl': logging.CRITICAL, 'asyncio': logging.CRITICAL + 1}


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether to print a record, whose texts and paths can then neither add a line nor steer a
    terminal.
    """
    if isinstance(record.args, tuple):
        record.args = tuple(_escaped(value) for value in record.args)
    package = record.name.split('.')[0]
    return package in OURS or record.levelno >= LEAST.get(package, logging.WARNING)


def _print_unless_late(unraisable: Any) -> None:
    """`sys.unraisablehook`, but for what Orbax's storage layer says once a save has failed."""
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def _escaped(value: Any) -> Any:
    return one_line(str(value)) if isinstance(value, str | Path) else value


def run(main: Callable[[], None]) -> None:
    """`absl.app.run`; a PspnetError is printed to stderr and ends with exit status 1.

    A run that a signal stopped behind a checkpoint ends as the signal would have ended it: 128
    and its number, 143 for SIGTERM.
    """
    absl_logging.get_absl_handler().addFilter(_is_shown)
    sys.unraisablehook = _print_unless_late

    def guarded(_) -> None:
        compilation.use_cache()
        try:
            hosts.start_from_flags()
            logger.info('%s', devices.describe())
            if advice := devices.idle_gpu():
                logger.warning('%s', advice)
            main()
        except StoppedError as error:
            print(error, file=sys.stderr)
            sys.exit(128 + error.signum)
        except KeyboardInterrupt:  # outside the loop of training, which stops at a checkpoint
            print('interrupted: the same command resumes', file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except PspnetError as error:
            hosts.leave_after_an_error(_line(error))
        except Exception as error:
            if isinstance(error, OSError) and error.filename:  # closed, too long a name, gone
                reason = f'{error.filename} can not be used ({error.strerror}): check its name '
                reason += 'and permissions, or give another'
                hosts.leave_after_an_error(_line(DataError(reason)))
            if not hosts.several():
                raise
            traceback.print_exc()
            hosts.leave_after_an_error(_line(hosts.lost()) if hosts.lost_another(error) else '')

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        argv, unset = prepare(argv)
        rest = flags.FLAGS(argv)
        if unset:
            flags.FLAGS['config'].value.update_from_flattened_dict(dict.fromkeys(unset))
    except PspnetError as error:
        _fail(error)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        _fail(ConfigError(_reason(str(error))))
    except SyntaxError as error:
        _fail(ConfigError(f'{error.filename}, line {error.lineno}: SyntaxError: {error.msg}'))
    except Exception as error:  # raised by a config file, whose author needs the place
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f'{type(error).__name__}: {error}'
        _fail(ConfigError(f'{place.filename}, line {place.lineno}: {reason}'))
    if len(rest) > 1:
        _fail(ConfigError(f'{rest[1:]} is not understood: flags are written --name=value'))
    return rest


def _reason(message: str) -> str:
    """The last line of an error in a flag, and of one in a config file where it was raised."""
    last = message.strip().splitlines()[-1]
    places = re.findall(r'File "([^"]+\.py)", line (\d+)', message)
    if ours := re.match(r'(?:\w+\.)*ValueError: (.*)', last):
        return ours[1]
    if places:
        path, line = places[-1]
        return f'{path}, line {line}: {last}'
    return f'{last}{_allowed(last)}'


def _allowed(message: str) -> str:
    match = re.search(r'--config\.([\w.]+)', message)
    return f'; {match[1]} must be {RULES[match[1]][1]}' if match and match[1] in RULES else ''


def _fail(error: PspnetError) -> NoReturn:
    print(_line(error), file=sys.stderr)
    sys.exit(1)


def _line(error: PspnetError) -> str:
    return f'error: {error}'
