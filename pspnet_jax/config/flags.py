"""A config on the command line: --config=PAGE, --config.KEY=VALUE, and its predict section."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from pspnet_jax.config import base
from pspnet_jax.config.rules import RULES, nearest
from pspnet_jax.runtime.errors import ConfigError

HERE = Path(__file__).parent
PAGES = ('phantom', 'lgg', 'folder')  # configs of the package, named without a path


def define_prediction_flags() -> None:
    """The config's `predict` section as flags; what is not given stays as the config has it."""
    defaults, told = base.get_config().predict, base.comments()
    for knob in defaults:
        kind, words = defaults.get_type(knob), told[f'predict.{knob}']
        define = {
            bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float,
            tuple: flags.DEFINE_list,
        }[kind]  # fmt: skip
        define(knob, None, words)


def prediction_changes() -> dict[str, Any]:
    """Those of the flags that were given, as values of the config. Raises ConfigError."""
    given = {knob: flags.FLAGS[knob].value for knob in base.get_config().predict}
    given = {knob: value for knob, value in given.items() if value is not None}
    for knob, value in given.items():
        if isinstance(value, list):
            try:
                given[knob] = tuple(map(float, value))
            except ValueError as error:
                raise ConfigError(f'--{knob}={",".join(value)}: {error}') from error
    return given


def prepare(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the arguments as absl and ml_collections take them, keys of the config that become None).

    A config's own folder is put on the path, so that its files can import each other. Raises
    ConfigError for a --config that is no file, and a --config.KEY or None that no config has.
    """
    arguments, unset, rest = [argv[0]], [], iter(argv[1:])
    for argument in rest:
        if re.fullmatch(r'--?config(\.[\w.]+)?', argument):  # --config FILE
            argument = f'{argument}={next(rest, "")}'
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
            if allowed(('a',)) and not re.match(r'\s*[(\[]', value):  # texts: a,b is two of them
                texts = tuple(text.strip().strip('"\'') for text in value.split(',') if text)
                argument = f'--config.{key}={texts!r}'
        arguments.append(argument)
    return arguments, unset
