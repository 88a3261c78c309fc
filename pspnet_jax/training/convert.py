"""Turns published weights into a run."""

import contextlib
import types
from pathlib import Path

from ml_collections import ConfigDict

from pspnet_jax import models
from pspnet_jax.config import to_dict, validate
from pspnet_jax.inference.networks import abstract_variables
from pspnet_jax.models import weights
from pspnet_jax.runtime import checkpoint
from pspnet_jax.runtime.errors import ConfigError, say


def convert(
    config: ConfigDict, source: str, out: str | Path, *, model: str = '', order: str | None = None
) -> None:
    """Write OUT/checkpoints/0 from the network in `source`, a file or hf:REPO[/FILE].

    `config` sets what the file does not tell. `model` is a name that the network must have. `order`
    ('RGB' or 'BGR') is the channel order that it was trained on, if not the source's usual one.
    Raises ConfigError, PretrainedError.
    """
    if checkpoint.steps(out):
        raise ConfigError(f'{out} holds checkpoints already: give another --out')
    path = weights.fetch(source)
    arrays = weights.read_arrays(path)
    kind = weights.detect(arrays, weights.NETWORKS)
    table, options = weights.TABLES[kind], weights.network_options(arrays, kind)
    if order:
        table = table._replace(normalization=table.normalization._replace(trained_order=order))
    if model and not weights.is_name_of(model, kind, options):
        raise ConfigError(
            f'{path} holds {options["name"]} on {options.get("backbone", "vgg16")} ({kind}), '
            f'not --model={model}'
        )
    channels = options.pop('channels')
    config.model.update(options)
    config.data.normalize = 'weights'
    validate(config)
    network = models.create(**config.model)
    variables = weights.load_network(abstract_variables(network, channels), arrays, table)
    state = types.SimpleNamespace(
        params=variables['params'],
        batch_stats=variables.get('batch_stats', {}),
        ema_params=None,
        opt_state=None,
    )
    with contextlib.closing(checkpoint.Writer(out)) as writer:
        checkpoint.save(
            writer,
            0,
            state,
            config=to_dict(config),
            progress={'best_dice': None, 'stale': 0},
            inputs={'channels': channels, 'normalization': table.normalization._asdict()},
            dice=None,
        )
    say(
        f'{out} is now a run of {options["name"]} with {config.model.num_classes} classes: '
        f'{len(arrays)} arrays from {path} ({kind}); it normalises images as {table.normalization}'
    )
