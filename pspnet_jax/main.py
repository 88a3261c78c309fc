"""Train a network by a config, with validation, checkpoints and a final evaluation.

  python -m pspnet_jax.main --config=configs/lgg.py:vgg_pspnet --workdir=runs/lgg

The same command resumes a stopped run from its newest checkpoint.
"""

from absl import flags
from ml_collections import config_flags

from pspnet_jax import cli
from pspnet_jax.runtime.errors import ConfigError

CONFIG = config_flags.DEFINE_config_file('config', None, 'what to run: FILE or FILE:ARGUMENT')
WORKDIR = flags.DEFINE_string('workdir', 'runs/last', 'checkpoints, metrics, evaluation')


def main() -> None:
    if CONFIG.value is None:
        raise ConfigError('--config is missing: give --config=phantom, which needs no data')
    from pspnet_jax.training.loop import train_and_evaluate

    train_and_evaluate(CONFIG.value, WORKDIR.value)


if __name__ == '__main__':
    cli.define_host_flags()
    cli.run(main)
