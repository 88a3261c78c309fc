"""How every command starts: flags are parsed, a line names the devices, errors are one line and
exit status 1. What a command compiles is kept for the next.
"""

import logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from pspnet_jax import compilation, devices, hosts
from pspnet_jax.config import RULES, nearest
from pspnet_jax.errors import ConfigError, PspnetError, StoppedError

logger = logging.getLogger(__name__)

GROUP = (
    "the patient in a file's name, as data.group; '': each file is by itself; without: as the run"
)
# The packages whose INFO is printed: ours, and a command's own module.
OURS = ('pspnet_jax', 'experiments', '__main__')
# Of all others it is WARNING and above, but for these. Orbax, tfds and Grain log their inner
# workings by absl's logger, and asyncio at length what Orbax raises on a damaged checkpoint.
LEAST = {'absl': logging.ERROR, 'asyncio': logging.CRITICAL + 1}


def _is_shown(record: logging.LogRecord) -> bool:
    package = record.name.split('.')[0]
    return package in OURS or record.levelno >= LEAST.get(package, logging.WARNING)


def run(main: Callable[[], None]) -> None:
    """`absl.app.run`; a PspnetError is printed to stderr and ends with exit status 1.

    A run that a signal stopped behind a checkpoint ends as the signal would have ended it: 128
    and its number, 143 for SIGTERM.
    """
    absl_logging.get_absl_handler().addFilter(_is_shown)

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
        except PspnetError as error:
            hosts.leave_after_an_error(_line(error))
        except Exception as error:
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
        check_config_flags(argv)
        rest = flags.FLAGS(list(argv))
    except PspnetError as error:
        _fail(error)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        # A config file that raises comes wrapped in its whole traceback: the end says why.
        reason = str(error).strip().splitlines()[-1]
        _fail(ConfigError(f'{reason}{_allowed(reason)}'))
    if len(rest) > 1:
        _fail(ConfigError(f'{rest[1:]} is not understood: flags are written --name=value'))
    return rest


def check_config_flags(argv: Sequence[str]) -> None:
    """Raise ConfigError for a --config that is no file and a --config.KEY that no config has."""
    for argument in argv[1:]:
        if match := re.match(r'--?config=([^:]+)', argument):
            if not Path(match[1]).is_file():
                raise ConfigError(f'--config={match[1]} is not a file: see configs/ for those here')
        elif (match := re.match(r'--?config\.([\w.]+)', argument)) and match[1] not in RULES:
            raise ConfigError(f'--config.{match[1]} is not a key{nearest(match[1])}')


def _allowed(message: str) -> str:
    match = re.search(r'--config\.([\w.]+)', message)
    return f'; {match[1]} must be {RULES[match[1]][1]}' if match and match[1] in RULES else ''


def _fail(error: PspnetError) -> NoReturn:
    print(_line(error), file=sys.stderr)
    sys.exit(1)


def _line(error: PspnetError) -> str:
    return f'error: {error}'
