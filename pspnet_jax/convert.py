"""A checkpoint from a published network: torchvision's, smp's, semseg's, image-segmentation-keras'.

  python -m pspnet_jax.convert --source=FILE --model=fcn_resnet50 --out=RUN

What is in the file is seen from its names (pspnet_jax/models/weights); --model, where given, must
agree. RUN can then be evaluated, predict, be exported, and start a training (train.init_from).
"""

import contextlib
import types
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from pspnet_jax import checkpoint, cli, models
from pspnet_jax.config import to_dict, validate
from pspnet_jax.config.flags import HERE
from pspnet_jax.errors import ConfigError, say
from pspnet_jax.models import weights
from pspnet_jax.runs import abstract_variables


def convert(
    config: ConfigDict, source: str, out: str | Path, *, model: str = '', order: str | None = None
) -> None:
    """Write OUT/checkpoints/0 from the network in `source`, a file or hf:REPO[/FILE].

    `config` is of what the file does not say. `model` is a name that the network must go by;
    `order`, 'RGB' or 'BGR', that of the channels it was trained on, where not its source's. Raises
    ConfigError, PretrainedError.
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
        f'{len(arrays)} arrays of {path} ({kind}) are {options["name"]} in {out}: '
        f'{config.model.num_classes} classes, images as {table.normalization}'
    )


def main() -> None:
    given = flags.FLAGS
    convert(given.config, given.source, given.out, model=given.model, order=given.order)


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', str(HERE / 'base.py'), "the rest of the run's config")
    flags.DEFINE_string('source', None, "the network's weights: a file, or hf:REPO[/FILE]")
    flags.DEFINE_string('model', '', "what the file must hold, such as fcn_resnet50; '': any")
    flags.DEFINE_enum('order', None, ['RGB', 'BGR'], "it was trained on, where not its source's")
    flags.DEFINE_string('out', None, 'workdir that gets the checkpoint')
    flags.mark_flags_as_required(['source', 'out'])
    cli.run(main)
