"""Starts every command: parses flags, prints the device, and on an error prints one line and exits
with status 1. Compiled programs are cached for the next command. `pspnet` starts them all.
"""

import functools
import importlib.metadata
import logging
import re
import runpy
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from tqdm import tqdm

from pspnet_jax.config import RULES, augmentations
from pspnet_jax.config.flags import PAGES, prepare
from pspnet_jax.runtime.errors import ConfigError, DataError, PspnetError, StoppedError, one_line

logger = logging.getLogger(__name__)

COMMANDS = {  # of `pspnet`: the module, and what it does
    'train': ('main', 'train and evaluate by a config, or resume a run'),
    'build': ('build', 'build the LGG data set (training does this automatically)'),
    'rasterize': ('rasterize', 'write masks from the regions of an annotation file'),
    'check': ('check', 'list what is in a data set, and what is wrong with it'),
    'evaluate': ('evaluate', 'score a trained network on cases with known masks'),
    'predict': ('predict', 'write masks and pictures for images, volumes and videos'),
    'export': ('export', 'write a trained network as StableHLO or ONNX'),
    'convert': ('convert', 'turn published weights into a run'),
}
WORKDIRS = 'folder of a run; several, repeated or separated by commas, are averaged'
GROUP = "the patient in a file's name, as data.group; '': each file alone; default: as in the run"
# The packages whose INFO is printed: ours, and a command's own module.
OURS = ('pspnet_jax', 'experiments', '__main__')
# Others print WARNING and above, except these: Orbax, tfds and Grain log details by absl's logger,
# and like asyncio they log errors at length before they raise them.
LEAST = {'absl': logging.CRITICAL, 'asyncio': logging.CRITICAL + 1}


def workdirs(values: Sequence[str]) -> list[str]:
    """The folders that a --workdir of WORKDIRS names; a folder's own name may have commas."""
    return [
        name for text in values for name in ([text] if Path(text).exists() else text.split(','))
    ]


class _Console(logging.StreamHandler):
    """Logs to stderr: lines other than INFO start with their level; a progress bar stays below."""

    def __init__(self):
        super().__init__()
        self.addFilter(_is_shown)

    def format(self, record: logging.LogRecord) -> str:
        level = '' if record.levelno <= logging.INFO else f'{record.levelname.lower()}: '
        return level + super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether to print a record; escapes unprintable characters in its texts and paths."""
    if isinstance(record.args, tuple):
        record.args = tuple(_escaped(value) for value in record.args)
    package = record.name.split('.')[0]
    return package in OURS or record.levelno >= LEAST.get(package, logging.WARNING)


def _print_unless_late(unraisable: Any) -> None:
    """`sys.unraisablehook` without the message of Orbax's storage layer after a failed save."""
    if str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def _escaped(value: Any) -> Any:
    return one_line(str(value)) if isinstance(value, str | Path) else value


def pspnet() -> None:
    """The console script: `pspnet COMMAND --flag=value`."""
    name, *rest = sys.argv[1:] or ['--help']
    if name in ('--help', '-h', 'help'):
        print('pspnet COMMAND --help lists the options of each:\n')
        print('\n'.join(f'  {name:10}{words}' for name, (_, words) in COMMANDS.items()))
        return
    if name == '--version':
        print(importlib.metadata.version('pspnet_jax'))
        return
    if name not in COMMANDS:
        _fail(ConfigError(f'pspnet {name} is not a command: give one of {", ".join(COMMANDS)}'))
    sys.argv = [f'pspnet {name}', *rest]
    runpy.run_module(f'pspnet_jax.{COMMANDS[name][0]}', run_name='__main__')


def run(main: Callable[[], None]) -> None:
    """`absl.app.run`; a PspnetError is printed to stderr and gives exit status 1.

    A run that a signal stopped after a checkpoint exits with 128 plus the signal's number, such as
    143 for SIGTERM.
    """
    sys.unraisablehook = _print_unless_late

    def guarded(_) -> None:
        from pspnet_jax.runtime import (
            compilation,
            devices,
            hosts,
        )  # JAX, which --help does not need

        logging.root.removeHandler(absl_logging.get_absl_handler())
        logging.root.addHandler(_Console())
        compilation.use_cache()
        try:
            options = flags.FLAGS
            if 'coordinator' in options:
                given = (options.coordinator, options.num_processes, options.process_id)
                hosts.start(*given, options.host_timeout)
            logger.info('%s', devices.describe())
            if advice := devices.idle_gpu():
                logger.warning('%s', advice)
            main()
        except StoppedError as error:
            print(error, file=sys.stderr)
            sys.exit(128 + error.signum)
        except KeyboardInterrupt:  # outside the training loop, which stops at a checkpoint
            print('interrupted: the same command resumes', file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except PspnetError as error:
            hosts.leave_after_an_error(_line(error))
        except Exception as error:
            if isinstance(error, OSError) and error.filename:  # no permission, name too long, gone
                reason = f'{error.filename} can not be used ({error.strerror}): check its name '
                reason += 'and permissions, or give another path'
                hosts.leave_after_an_error(_line(DataError(reason)))
            if not hosts.several():
                raise
            traceback.print_exc()
            hosts.leave_after_an_error(_line(hosts.lost()) if hosts.lost_another(error) else '')

    app.run(guarded, flags_parser=functools.partial(_parse, main.__globals__['__doc__']))


def define_host_flags() -> None:
    """Define --coordinator and the other flags of commands that several processes can run."""
    flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, for several processes')
    flags.DEFINE_integer('num_processes', None, 'number of processes, all with the same command')
    flags.DEFINE_integer('process_id', None, 'number of this process, from 0')
    flags.DEFINE_integer('host_timeout', 60, 'seconds after which a silent process counts as lost')


def _help(told: str) -> str:
    """The help of a command: its module's docstring `told`, and its own flags."""
    lines = [told.strip(), '', 'Flags:']
    modules = flags.FLAGS.flags_by_module_dict()
    own = [name for name in modules if name == sys.argv[0] or name.startswith('pspnet_jax')]
    key = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    for flag in dict.fromkeys([*key, *(flag for name in own for flag in modules[name])]):
        default = '' if flag.default in (None, '', False, []) else f' ({flag.default_as_str})'
        lines.append(f'  --{flag.name}{default}: {" ".join((flag.help or "").split())}')
    if 'config' in flags.FLAGS:
        from pspnet_jax import models

        lines += [
            '',
            'Every key of a config is a flag: --config.KEY=VALUE. pspnet_jax/config/base.py lists',
            f'all keys and defaults. Configs: {", ".join(PAGES)}, or a file of your own;',
            'an argument after a colon chooses the network and an augmentation recipe,',
            '--config=lgg:unet,strong.',
            *textwrap.wrap(f'Networks: {", ".join(models.names())}', 90, subsequent_indent='  '),
            *textwrap.wrap(f'Recipes: {", ".join(augmentations.RECIPES)}', 90),
        ]
    return '\n'.join([*lines, '', '--helpfull lists the flags of all libraries too.'])


def _parse(told: str, argv: Sequence[str]) -> list[str]:
    if {'--help', '-h', '-help'} & set(argv):
        print(_help(told))
        sys.exit()
    try:
        argv, unset = prepare(argv)
        rest = flags.FLAGS(argv)
        if unset:
            flags.FLAGS.config.update_from_flattened_dict(dict.fromkeys(unset))
    except PspnetError as error:
        _fail(error)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        _fail(ConfigError(_reason(str(error))))
    except SyntaxError as error:
        _fail(ConfigError(f'{error.filename}, line {error.lineno}: SyntaxError: {error.msg}'))
    except Exception as error:  # raised by a config file: tell its author where
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f'{type(error).__name__}: {error}'
        _fail(ConfigError(f'{place.filename}, line {place.lineno}: {reason}'))
    if len(rest) > 1:
        _fail(ConfigError(f'{rest[1:]} is not understood: flags are written --name=value'))
    return rest


def _reason(message: str) -> str:
    """The last line of an error in a flag; for an error in a config file, with its place."""
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
