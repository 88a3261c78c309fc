"""Evaluate a checkpoint: metrics per case, and over cases.

  python -m pspnet_jax.evaluate --workdir=RUN --split=test
  python -m pspnet_jax.evaluate --workdir=RUN --data=FOLDER
  python -m pspnet_jax.evaluate --workdir=RUN1,RUN2,RUN3 --out=FOLDER --flip
  python -m pspnet_jax.evaluate --workdir=RUN --split=validation --fit_temperature
  python -m pspnet_jax.evaluate --workdir=RUN --split=validation --choose_postprocessing

Results go to RUN/evaluation/NAME, where NAME is the split (test) or the data's folder; those of
the run's own test cases are copied to RUN/evaluation.json and RUN/report.html.

The main metric is Dice over a whole case, which is a patient's volume or an image: its mean, median
and deviation over cases. With several classes there are also metrics per class and a confusion
matrix. Per-slice and pooled metrics are named as such and come with the baseline that predicts all
background. docs/metrics.md defines each metric.
"""

from absl import flags

from pspnet_jax import cli
from pspnet_jax.config.flags import define_prediction_flags, prediction_changes


def main() -> None:
    from pspnet_jax.evaluation.protocol import evaluate_checkpoint

    options = flags.FLAGS
    fitted = {
        'postprocessing': options.choose_postprocessing,
        'temperature': options.fit_temperature,
    }
    evaluate_checkpoint(
        cli.workdirs(options.workdir),
        split=options.split,
        data=options.data,
        which=options.checkpoint,
        fit=[name for name, asked in fitted.items() if asked],
        group=options.group,
        out=options.out,
        changes=prediction_changes(),
    )


if __name__ == '__main__':
    flags.DEFINE_multi_string('workdir', None, cli.WORKDIRS, required=True)
    flags.DEFINE_enum(
        'split', '', ['', 'train', 'validation', 'test'],
        "which cases; '': test (validation if that is empty), or all cases of --data",
    )  # fmt: skip
    flags.DEFINE_string(
        'out', '', "folder for the results; '': in the run, one per split or data set"
    )
    flags.DEFINE_string('data', '', 'a folder with images/ and masks/, or kaggle_3m')
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as in the config")
    flags.DEFINE_string('group', None, f'for --data: {cli.GROUP}')
    flags.DEFINE_bool(
        'fit_temperature', False, 'fit it on --split=validation and store it with the run'
    )
    flags.DEFINE_bool(
        'choose_postprocessing', False,
        'choose flip, threshold, components on --split=validation and store them with the run',
    )  # fmt: skip
    define_prediction_flags(figures=True)
    cli.define_host_flags()
    cli.run(main)
