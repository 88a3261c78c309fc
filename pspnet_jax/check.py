"""Look at a data set before training on it: every fault, what is in it, leaks, a contact sheet.

  python -m pspnet_jax.check --config=configs/folder.py --config.data.source=FOLDER --out=CHECK

Unreadable files, missing masks, sizes and labels that do not fit are listed at once, with the
remedy of each. Then: patients, sizes, share of each class, and pictures that are nearly the same in
two parts of the split, which makes figures too good. CHECK/contact_sheet.png shows slices of
training, validation and test with outlines, names and a legend, and how augmentation changes those
of training.
"""

from absl import flags
from ml_collections import config_flags

from pspnet_jax import cli
from pspnet_jax.runtime.errors import ConfigError


def main() -> None:
    if flags.FLAGS.config is None:
        raise ConfigError('--config is missing: --config=configs/folder.py for your own pictures')
    from pspnet_jax.training.check import check

    check(flags.FLAGS.config, flags.FLAGS.out)


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'the data set: FILE or FILE:ARGUMENT')
    flags.DEFINE_string('out', 'runs/check', 'folder for the contact sheet')
    cli.run(main)
