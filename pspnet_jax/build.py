"""Build the LGG data set for TensorFlow Datasets; training does this automatically.

python -m pspnet_jax.build --source=FOLDER --out=FOLDER
"""

from absl import flags

from pspnet_jax import cli
from pspnet_jax.runtime.errors import say


def main() -> None:
    from pspnet_jax.data.lgg import build

    builder = build(flags.FLAGS.source, flags.FLAGS.out)
    for split, info in builder.info.splits.items():
        print(f'{split}: {info.num_examples} slices')
    say(f'built in {builder.data_dir}')


if __name__ == '__main__':
    flags.DEFINE_string('source', '', 'folder that holds kaggle_3m; empty: download from Kaggle')
    flags.DEFINE_string('out', '', "where to build; empty: tfds' own folder")
    cli.run(main)
