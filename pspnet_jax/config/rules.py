"""The allowed values of a config: one rule per key, checked before anything runs.

Unknown and missing keys are errors too. A checkpoint carries its config and may be untrusted, so
no allowed value asks for more memory or time than a command can give.
"""

import difflib
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pspnet_jax.config import base
from pspnet_jax.data import masks, pairing, sources
from pspnet_jax.runtime.errors import ConfigError

Rule = tuple[Callable[[Any], bool], Any]  # (is a value allowed?, `str` of it: what is allowed)

BASE = 'pspnet_jax/config/base.py'
LARGEST = 2**31 - 1  # whole number
FURTHEST = 1e30  # other number; excludes infinity
LONGEST = 4096  # characters
SHORT = reprlib.Repr()  # of values in errors, which may be of any length and depth
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 120
SHORT.maxtuple = SHORT.maxlist = SHORT.maxdict = 12
SHORT.maxlevel = 3


def _one_of(*values) -> Rule:
    def check(x):  # 8.0 == 8 and True == 1, but they are not the same
        return any(type(x) is type(value) and x == value for value in values)

    return check, f'one of {", ".join(map(repr, values))}'


class _Words:
    """A description of what is allowed, made only when it is printed."""

    def __init__(self, say: Callable[[], str]):
        self.say = say

    def __str__(self) -> str:
        return self.say()


def _named(names: Callable[[], Iterable[Any]]) -> Rule:
    """One of the names that exist when a config is checked, including entries added by then."""
    return (lambda x: _one_of(*names())[0](x)), _Words(lambda: _one_of(*names())[1])


def _networks() -> tuple[str, ...]:
    from pspnet_jax import models  # imports Flax, which --help does not need

    return tuple(dict.fromkeys((*models.MODELS, *models.ALIASES)))


def _backbones() -> tuple[str, ...]:
    from pspnet_jax.models import backbones

    return tuple(backbones.BACKBONES)


def _output_strides() -> tuple[int, ...]:
    from pspnet_jax.models import backbones

    return backbones.OUTPUT_STRIDES


def _is_int(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _integer(low: int, high: int = LARGEST) -> Rule:
    return (lambda x: _is_int(x) and low <= x <= high), f'a whole number {_range(low, high)}'


def _number(low: float, high: float = FURTHEST) -> Rule:
    return (lambda x: _is_number(x) and low <= x <= high), f'a number {_range(low, high)}'


def _range(low: float, high: float) -> str:
    return f'of at least {low}' if high in (LARGEST, FURTHEST) else f'from {low} to {high}'


def _is_extra(x) -> bool:
    if not isinstance(x, Mapping) or len(x) > 100:
        return False
    return all(
        isinstance(name, str)
        and re.fullmatch('[a-z][a-z0-9_]{0,99}', name)
        and not hasattr(ConfigDict, name)  # the names of its methods can't be keys
        and _number(0)[0](weight)
        for name, weight in x.items()
    )


def _all(rule: Rule, length: int | None = None, least: int = 0, most: int = 255) -> Rule:
    allowed, words = rule
    size = f'{length} values' if length else f'at least {least} values' if least else 'values'

    def check(xs):
        if not isinstance(xs, tuple):
            return False
        right_length = len(xs) == length if length else least <= len(xs) <= most
        return right_length and all(map(allowed, xs))

    return check, f'a tuple of {size}, each {words}'


def _or_none(rule: Rule) -> Rule:
    allowed, words = rule
    told = _Words(lambda: f'None (see {BASE}) or {words}')
    return (lambda x: x is None or allowed(x)), told


def _is_size(x) -> bool:
    return x == () or (len(x) == 2 and all(_is_int(n) and 16 <= n <= 2**14 for n in x))


def _is_label_map(x) -> bool:
    if not isinstance(x, Mapping) or not 0 < len(x) <= 1024:
        return False
    try:
        return bool(masks.parse_map(x))
    except ValueError:
        return False


_BOOL: Rule = (lambda x: isinstance(x, bool)), 'True or False'
_TEXT: Rule = (
    (lambda x: isinstance(x, str) and len(x) <= LONGEST and '\0' not in x),
    f'a text of at most {LONGEST} characters',
)
_NAME: Rule = (
    (lambda x: isinstance(x, str) and len(x) <= 200 and x.isprintable()),
    'a text of at most 200 characters, in one line',
)
_POSITIVE: Rule = (lambda x: _is_number(x) and 0 < x <= FURTHEST), 'a number above 0'
_SCALES: Rule = _all(_number(0.01, 16), least=1, most=16)

# Values for configs that are older than the key, where today's default is not what was done then.
BEFORE = {'data.fit': 'stretch'}

NEW_KNOB = f'to add a key, put its default in {BASE} and its limits in rules.py next to it'
# The rules of keys whose default's type is not enough. By type, a key may be any whole number or
# number from 0 on, a text, a tuple of texts, or True or False.
LIMITS: dict[str, Rule] = {
    'parallel': _one_of('jit', 'pmap'),
    'model.name': _named(_networks),
    'model.num_classes': (
        lambda x: x is None or (_is_int(x) and 2 <= x <= 255),
        'a whole number from 2 to 255 (background is a class too, so one structure needs 2), or '
        'None for as many as the masks have',
    ),
    'model.class_names': _all(_NAME),
    'model.width': _integer(4),
    'model.dtype': _one_of('float32', 'bfloat16'),
    'model.stem': _one_of('cycle', 'mean'),
    'model.backbone': _or_none(_named(_backbones)),
    'model.output_stride': _or_none(_named(_output_strides)),
    'model.dropout': _or_none(_number(0, 0.99)),
    'model.rates': _or_none(_all(_integer(1), least=1, most=16)),
    'model.multi_grid': _or_none(_all(_integer(1), least=1, most=64)),
    'model.bins': _all(_integer(1), most=16),
    'model.context': _one_of('basic', 'large', 'none'),
    'model.scales': _SCALES,
    'model.variant': _one_of('paper', 'torchvision', 'smp'),
    'data.name': _named(lambda: sources.SOURCES),
    'data.images': _all(_TEXT, least=1),
    'data.mask_format': _one_of('auto', 'index', 'binary', 'color'),
    'data.label_map': (
        lambda x: x is None or _is_label_map(x),
        "None or a mapping from mask values to classes, such as {4: 3} or {'>0': 1}",
    ),
    'data.mask_name': (
        lambda x: _TEXT[0](x) and pairing.is_rule(x),
        "a text with {stem} at most once and at most one * after it, such as '{stem}_mask*'",
    ),
    'data.size': (
        lambda x: isinstance(x, tuple) and _is_size(x),
        '(), or a tuple of height and width from 16 to 16384',
    ),
    'data.fit': _or_none(_one_of('letterbox', 'stretch')),
    'data.context': _integer(0, 5),
    'data.normalize': _or_none(_one_of('volume', 'buda', 'weights')),
    'data.split': _one_of('holdout', 'kfold', 'site'),
    'data.folds': _integer(2),
    'data.test_fraction': _number(0, 0.9),
    'data.validation_fraction': _number(0, 0.9),
    'data.sampling': _one_of('lesion', 'uniform'),
    'data.lesion_floor': _number(0, 1),
    'data.threads': _integer(1),
    'data.bad_slices': _one_of('stop', 'skip'),
    'data.cache': _one_of('none', 'memory', 'device'),
    'phantom.volumes': _integer(3, 10_000),
    'phantom.slices': _integer(4, 1024),
    'phantom.size': _integer(32, 1024),
    'augment.flip': _number(0, 1),
    'augment.flip_vertical': _number(0, 1),
    'augment.rotate': _number(0, 180),
    'augment.blur_probability': _number(0, 1),
    'augment.low_resolution': _number(0, 0.95),
    'augment.low_resolution_probability': _number(0, 1),
    'augment.gamma_probability': _number(0, 1),
    'augment.gain': _number(0, 1),
    'augment.channel_dropout': _number(0, 1),
    'augment.kept_channel': _or_none(_integer(0)),
    'loss.tversky_alpha': _POSITIVE,
    'loss.tversky_beta': _POSITIVE,
    'loss.top_k_share': ((lambda x: _is_number(x) and 0 < x <= 1), 'a number above 0, at most 1'),
    'loss.extra': (
        lambda x: x is None or _is_extra(x),
        "None or a mapping from your own entries of losses.TERMS to weights, such as {'mine': 0.5}",
    ),
    'loss.class_weights': _all(_number(0)),
    'loss.ignore_label': _integer(0, 255),
    'optim.name': _one_of('adamw', 'adam', 'adamax', 'sgd', 'rmsprop', 'adagrad', 'adadelta'),
    'optim.learning_rate': _or_none(_POSITIVE),
    'optim.new_layer_factor': _or_none(_POSITIVE),
    'optim.schedule': _one_of('poly', 'cosine', 'constant'),
    'optim.power': _POSITIVE,
    'optim.warmup': _number(0, 1),
    'optim.momentum': _number(0, 1),
    'optim.beta2': _number(0, 1),
    'optim.rho': _number(0, 1),
    'distill.loss': _one_of('kl', 'l1', 'l2'),
    'distill.temperature': _POSITIVE,
    'distill.nodes': _integer(2, 32),
    'train.batch_size': _integer(1),
    'train.accumulate': _integer(1),
    'train.remat': _one_of('none', 'pointwise'),
    'train.steps_per_call': _integer(1),
    'train.epochs': _or_none(_POSITIVE),
    'train.ema_decay': _number(0, 0.99999),
    'train.log_every': _integer(1),
    'train.nan_policy': _one_of('stop', 'skip'),
    'crf.kernel': _one_of('none', 'exact', 'windowed'),
    'crf.window': _integer(1, 256),
    'crf.iterations': _integer(1, 1000),
    'crf.spatial_sigma': _POSITIVE,
    'crf.bilateral_sigma': _POSITIVE,
    'crf.color_sigma': _POSITIVE,
    'predict.window': _integer(0, 2**14),
    'predict.overlap': _number(0, 0.9),
    'predict.scales': _SCALES,
    'predict.threshold': _or_none(_number(0, 1)),
    'eval.batch_size': _integer(1, 4096),
    'eval.spacing': _all(_POSITIVE, length=3),
    'eval.lesion_dilation': _integer(0, 100),
    'eval.calibration_bins': _integer(2, 1000),
    'eval.bootstrap': _integer(1, 10**6),
    'eval.checkpoint': (_NAME[0], "'best', 'last' or a step"),
}


def _by_default(kind: type) -> Rule:
    return {
        bool: _BOOL, int: _integer(0), float: _number(0), str: _TEXT, tuple: _all(_TEXT)
    }[kind]  # fmt: skip


def _rules() -> dict[str, Rule]:
    """The rule of every key, in the order of base.py."""
    defaults, rules = base.get_config(), {}
    for key, value in flatten(defaults.to_dict()).items():
        section, _, knob = key.rpartition('.')
        kind = (defaults[section] if section else defaults).get_type(knob)
        own = _by_default(kind) if key not in LIMITS else LIMITS[key]
        rules[key] = _or_none(own) if value is None and key not in LIMITS else own
    return rules


def validate(config: ConfigDict) -> None:
    """Raise one ConfigError that lists every key and value that is wrong."""
    faults = _faults(flatten(config.to_dict())) or list(_contradictions(config))
    if faults:
        raise ConfigError('the config can not run:', sorted(faults))


def _faults(given: Mapping[str, Any]) -> list[str]:
    faults = []
    for key in sorted(given.keys() - RULES.keys())[:50]:  # an untrusted config may have any number
        faults.append(f'{key[:100]} is not a key{nearest(key[:100])}; {NEW_KNOB}')
    for key in RULES.keys() - given.keys():
        faults.append(f'{key} is missing: {BASE} has its default')
    for key in RULES.keys() & given.keys():
        allowed, words = RULES[key]
        if not allowed(given[key]):
            faults.append(f'{key} is {_shown(given[key])}: it must be {words}')
    return faults


def _shown(value: Any) -> str:
    return SHORT.repr(value)[:400]


def _contradictions(config: ConfigDict):
    """Faults of values that are each allowed, but not together."""
    from pspnet_jax import models

    model, loss, train, distill = config.model, config.loss, config.train, config.distill
    taught = bool(distill.teacher and (distill.weight or distill.pairwise))
    if distill.teacher and not taught:
        yield 'distill.weight and distill.pairwise are both 0: give one a weight, or no teacher'
    if train.init_from and model.pretrained not in ('', 'imagenet'):
        yield 'train.init_from and model.pretrained both give the initial weights: set only one'
    count = model.num_classes or len(model.class_names)  # 0: as many as the data has
    if loss.class_weights and len(loss.class_weights) != (count or len(loss.class_weights)):
        yield (
            f'loss.class_weights has {len(loss.class_weights)} values: '
            f'it must have one for each of {count} classes'
        )
    if model.class_names and len(model.class_names) != count:
        yield (
            f'model.class_names has {len(model.class_names)} values: '
            f'it must have one for each of {count} classes, background first'
        )
    if model.num_classes == 2 and loss.ignore_label == 1:
        yield (
            'loss.ignore_label is 1, the only structure of 2 classes: set loss.ignore_label=255, '
            'or model.num_classes=3 where 2 is a structure too'
        )
    if config.predict.window and config.data.size:
        yield (
            'predict.window takes tiles of images at their own size, but data.size is '
            f'{tuple(config.data.size)} and resizes them: add --config.predict.window=0 or, where '
            'all images have one size, --config.data.size="()"'
        )
    if config.predict.threshold is not None and count > 2:
        yield (
            f'predict.threshold is for two classes, but the model has {count}: '
            'leave it as None, and each pixel gets its likeliest class'
        )
    if config.data.label_map and (config.data.mask_colors or config.data.mask_format == 'binary'):
        yield (
            'data.label_map gives each value its class, data.mask_colors and data.mask_format '
            "'binary' give them too: set one"
        )
    if config.data.fold >= config.data.folds:
        yield f'data.fold is {config.data.fold}: it must be below data.folds, {config.data.folds}'
    if config.data.cache == 'device' and config.parallel == 'pmap':
        yield "data.cache 'device' is for parallel 'jit', not 'pmap': change one"
    try:
        models.create(**{**model, 'num_classes': count or 2})
    except ValueError as error:
        yield f'model: {error}'
    if train.steps and train.epochs not in (None, base.get_config().train.epochs):
        yield (
            f'train.epochs is {train.epochs:g}, but train.steps is {train.steps} and takes '
            'precedence: add --config.train.steps=0 to count epochs'
        )
    if train.batch_size % train.accumulate:
        yield (
            f'train.batch_size {train.batch_size} is not a multiple of '
            f'train.accumulate {train.accumulate}'
        )


def nearest(key: str) -> str:
    """': did you mean KEY?' if a known key is close, else a list of the keys."""
    close = difflib.get_close_matches(key, RULES, n=1, cutoff=0.6)
    return f': did you mean {close[0]}?' if close else f'; the keys are: {", ".join(RULES)}'


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{'a': {'b': 1}, 'c': 2} -> {'a.b': 1, 'c': 2}: sections hold no sections."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f'{key}.{knob}': x for knob, x in value.items()})
        else:
            flat[key] = value
    return flat


RULES = _rules()
PATHS = (  # keys that name a file or folder, relative to the current folder
    'data.source', 'data.root', 'data.split_file', 'data.group', 'model.pretrained',
    'train.init_from', 'distill.teacher',
)  # fmt: skip


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
    """A copy with absolute paths, since evaluation may start in another folder.

    ~ is expanded. A value that is not an existing path, such as hf:REPO, stays as it is.
    """
    config = config.copy_and_resolve_references()

    def absolute(text: str) -> str:
        name, at, step = text.rpartition('@')  # WORKDIR@260
        for path, rest in ((text, ''), (name, at + step)):
            if path and Path(path).expanduser().exists():
                return str(Path(path).expanduser().absolute()) + rest
        return text

    flat = flatten(config.to_dict())
    changes: dict[str, Any] = {key: absolute(flat[key]) for key in PATHS if flat[key]}
    if config.data.name == 'folder' and not config.data.source:
        changes['data.images'] = tuple(map(absolute, config.data.images))
        changes['data.masks'] = absolute(config.data.masks)
    config.update_from_flattened_dict(changes)
    return config


def without_paths(config: ConfigDict) -> ConfigDict:
    """A copy for other machines: defaults replace absolute paths."""
    config = config.copy_and_resolve_references()
    defaults = flatten(base.get_config().to_dict())
    flat = flatten(config.to_dict())
    for key in (*PATHS, 'data.images', 'data.masks'):
        values = flat[key] if isinstance(flat[key], tuple | list) else [flat[key]]
        if any(os.path.isabs(str(value)) for value in values):
            config.update_from_flattened_dict({key: defaults[key]})
    return config


# What evaluation and prediction may change: how the network is applied, memory use and metrics.
# Training fixed the rest.
CHANGEABLE = (
    *(key for key in RULES if key.startswith('eval.') and key != 'eval.checkpoint'),
    'data.threads',
    *(key for key in RULES if key.startswith(('predict.', 'crf.'))),
)


def with_prediction(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with `changes`, validated and locked.

    `changes` may be keys of the `predict` section, {'flip': True}, and other keys of CHANGEABLE,
    {'eval.batch_size': 4}. Raises ConfigError for other keys.
    """
    changed = to_dict(config)
    for key, value in changes.items():
        section, _, knob = key.rpartition('.')
        if section and key not in CHANGEABLE:
            raise ConfigError(fixed(key, CHANGEABLE))
        changed[section or 'predict'][knob] = value
    return from_dict(changed)


def fixed(key: str, changeable: Iterable[str]) -> str:
    """Why evaluation and prediction do not take `key`, and which keys they take."""
    if key == 'eval.checkpoint':
        return 'eval.checkpoint has its own flag: give --checkpoint'
    return f'{key} is fixed by training: you can change {", ".join(changeable)}'


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(tree: Mapping[str, Any]) -> ConfigDict:
    """Read a config that `to_dict` wrote; validate and lock it.

    A key that is newer than the config gets its value from BEFORE, else today's default.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f'a config is a mapping of sections, not {_shown(tree)}')
    if dotted := [key for key in tree if '.' in key]:
        raise ConfigError(f'{_shown(dotted)} are not sections: see {BASE}')
    defaults = base.get_config().to_dict()
    for name, section in defaults.items():
        if isinstance(section, dict) != isinstance(tree.get(name, section), Mapping):
            raise ConfigError(f'{name} is {_shown(tree[name])}: see {BASE}')
    filled = {**defaults, **tree}
    for key, value in BEFORE.items():
        section, _, knob = key.partition('.')
        defaults[section][knob] = value
    filled |= {k: {**x, **tree.get(k, {})} for k, x in defaults.items() if isinstance(x, dict)}
    # Checked before it becomes a ConfigDict, which gives some keys and values a special meaning.
    plain = {key: _tuples(value) for key, value in flatten(filled).items()}
    if faults := _faults(plain):
        raise ConfigError('the config can not run:', sorted(faults))
    config = ConfigDict(
        {k: _section(x) if isinstance(x, Mapping) else x for k, x in filled.items()}
    )
    validate(config)
    return config.lock()


def _section(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _tuples(value) for key, value in tree.items()}


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
