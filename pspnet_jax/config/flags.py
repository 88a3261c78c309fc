"""The config on the command line: --config=FILE and --config.KEY=VALUE for training, and the flags
by which evaluation and prediction change a run's config.
"""

import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from pspnet_jax.config import base
from pspnet_jax.config.rules import CHANGEABLE, RULES, fixed, nearest
from pspnet_jax.runtime.errors import ConfigError

HERE = Path(__file__).parent
PAGES = ('phantom', 'lgg', 'folder')  # configs of the package, named without a path


class _Value(flags.ArgumentParser):
    """Parses a value as Python or as text: 3, 0.5, None, (1, 2) or 1,2, or a word."""

    def __init__(self, key: str):
        section, knob = key.split('.')
        self.key, self.kind = key, base.get_config()[section].get_type(knob)
        self.syntactic_help = str(RULES[key][1])

    def parse(self, argument: Any) -> Any:
        try:
            value = ast.literal_eval(argument.strip()) if isinstance(argument, str) else argument
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = argument
        if self.kind is tuple and not isinstance(value, str):
            value = tuple(map(_as_float, value if isinstance(value, tuple | list) else [value]))
        value = _as_float(value) if self.kind is float else value
        allowed, words = RULES[self.key]
        if not allowed(value):
            raise ValueError(f'{self.key} must be {words}')
        return value


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value


def define_prediction_flags(*, figures: bool) -> None:
    """Define flags such as --flip and --config.crf.kernel, which change a run's config.

    Keys without a flag keep the run's value. Without `figures`, keys that only evaluation reads
    have no flag.
    """
    told = base.comments()
    for key in CHANGEABLE:
        if not figures and key.startswith('eval.') and key != 'eval.batch_size':
            continue
        parser, told_of = _Value(key), (_flag_of(key), None, told[key])
        if parser.kind is bool:
            flags.DEFINE_bool(*told_of, flag_values=flags.FLAGS)
        else:
            flags.DEFINE(parser, *told_of, flag_values=flags.FLAGS)


def _flag_of(key: str) -> str:
    return key.removeprefix('predict.') if key.startswith('predict.') else f'config.{key}'


def _changeable() -> list[str]:
    """The keys of CHANGEABLE for which the command has a flag."""
    return [key for key in CHANGEABLE if _flag_of(key) in flags.FLAGS]


def prediction_changes() -> dict[str, Any]:
    """The changes given as flags, for `with_prediction`."""
    given = {key: flags.FLAGS[_flag_of(key)] for key in _changeable()}
    return {key.removeprefix('predict.'): flag.value for key, flag in given.items() if flag.present}


def prepare(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments in the form that absl and ml_collections take, config keys that become None).

    The config file's folder is added to the path, so that files there can import each other.
    Raises ConfigError for a --config that is not a file, for an unknown --config.KEY or one that
    evaluation and prediction do not take, and for None where it is not allowed.
    """
    arguments, unset, rest = [argv[0]], [], iter(argv[1:])
    changeable = _changeable() if 'config' not in flags.FLAGS else []
    for argument in rest:
        if re.fullmatch(r'--?config(\.[\w.]+)?', argument):  # --config FILE
            argument = f'{argument}={next(rest, "")}'
        if changeable and (match := re.match(r'--?config(?:\.([\w.]+))?=', argument)):
            key = match[1] or '--config'
            if match[1] and key not in RULES:
                raise ConfigError(f'--config.{key} is not a key{nearest(key)}')
            if key not in changeable:
                raise ConfigError(fixed(key, changeable))
            arguments.append(f'--{_flag_of(key)}={argument[match.end() :]}')
            continue
        if match := re.match(r'--?config=([^:]*)(.*)', argument, re.DOTALL):
            path = Path(match[1])
            if match[1] in PAGES and not path.is_file():
                path = HERE / f'{match[1]}.py'
            elif not path.is_file():
                raise ConfigError(
                    f'--config={match[1]} is not a file: give one, or one of {", ".join(PAGES)}'
                )
            argument = f'--config={path}{match[2]}'
            sys.path.append(str(path.absolute().parent))
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
            if allowed(('a',)) and not re.match(r'\s*[(\[]', value):  # a,b means two texts
                texts = tuple(text.strip().strip('"\'') for text in value.split(',') if text)
                argument = f'--config.{key}={texts!r}'
        arguments.append(argument)
    return arguments, unset
