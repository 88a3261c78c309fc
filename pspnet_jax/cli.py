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
from pspnet_jax.config import RULES, nearest
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


def define_prediction_flags() -> None:
    """The config's `predict` section as flags; what is not given stays as the config has it."""
    flags.DEFINE_integer('window', None, 'pixels a side of the tiles the network sees; 0: images')
    flags.DEFINE_float('overlap', None, 'of neighbouring tiles, share of the window')
    flags.DEFINE_list('scales', None, 'mean over these sizes of the image: 0.75,1.0,1.25')
    flags.DEFINE_bool('flip', None, 'mean with the left-right mirror image')
    flags.DEFINE_float('threshold', None, 'of the probability of class 1, where there are two')
    flags.DEFINE_bool('largest_component', None, 'keep the largest component of each class')
    flags.DEFINE_integer('min_size', None, 'pixels or voxels of a component that is kept')


def prediction_changes() -> dict[str, Any]:
    """Those of the flags that were given, as values of the config. Raises ConfigError."""
    knobs = [key.removeprefix('predict.') for key in RULES if key.startswith('predict.')]
    given = {knob: flags.FLAGS[knob].value for knob in knobs}
    given = {knob: value for knob, value in given.items() if value is not None}
    if 'scales' in given:
        try:
            given['scales'] = tuple(map(float, given['scales']))
        except ValueError as error:
            raise ConfigError(f'--scales={",".join(given["scales"])}: {error}') from error
    return given


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


def prepare(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the arguments as absl and ml_collections take them, keys of the config that become None).

    A config's own folder is put on the path, so that its files can import each other. Raises
    ConfigError for a --config that is no file, and a --config.KEY or None that no config has.
    """
    arguments, unset, rest = [argv[0]], [], iter(argv[1:])
    for argument in rest:
        if re.fullmatch(r'--?config(\.[\w.]+)?', argument):  # --config FILE
            argument = f'{argument}={next(rest, "")}'
        if match := re.match(r'--?config=([^:]*)', argument):
            if not Path(match[1]).is_file():
                raise ConfigError(f'--config={match[1]} is not a file: see configs/ for those here')
            sys.path.append(str(Path(match[1]).absolute().parent))
        elif match := re.match(r'--?config\.([\w.]+)=(.*)', argument, re.DOTALL):
            key, value = match.groups()
            if key not in RULES:
                raise ConfigError(f'--config.{key} is not a key{nearest(key)}')
            allowed, words = RULES[key]
            if value == 'None':
                if not allowed(None):
                    raise ConfigError(f'--config.{key} can not be None: it must be {words}')
                unset.append(key)
                continue
            if allowed(('a',)) and not re.match(r'\s*[(\[]', value):  # texts: a,b is two of them
                texts = tuple(text.strip().strip('"\'') for text in value.split(',') if text)
                argument = f'--config.{key}={texts!r}'
        arguments.append(argument)
    return arguments, unset


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
