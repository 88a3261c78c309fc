"""Check a data set before training: list its faults, contents and leaks, and make a contact sheet.

  python -m pspnet_jax.check --config=configs/folder.py --config.data.source=FOLDER --out=CHECK

All unreadable files, missing masks and wrong sizes and labels are listed at once, each with a
remedy. Then it prints patients, sizes, the share of each class, and nearly identical images in
different parts of the split, which make results too optimistic. CHECK/contact_sheet.png shows
slices of training, validation and test with outlines, names and a legend, and augmented training
slices.
"""

from absl import flags
from ml_collections import config_flags

from pspnet_jax import cli
from pspnet_jax.runtime.errors import ConfigError


def main() -> None:
    if flags.FLAGS.config is None:
        raise ConfigError('--config is missing: give --config=folder for your own images')
    from pspnet_jax.training.check import check

    check(flags.FLAGS.config, flags.FLAGS.out)


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'the data set: FILE or FILE:ARGUMENT')
    flags.DEFINE_string('out', 'runs/check', 'folder for the contact sheet')
    cli.run(main)
