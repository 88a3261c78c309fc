"""A checkpoint's score: per case first, then over cases.

  python -m pspnet_jax.evaluate --workdir=RUN --split=test
  python -m pspnet_jax.evaluate --workdir=RUN --data=FOLDER
  python -m pspnet_jax.evaluate --workdir=RUN --split=validation --fit_temperature
  python -m pspnet_jax.evaluate --workdir=RUN --split=validation --choose_postprocessing

Results go to RUN/evaluation/test, or the name of the split or of the data's folder; those of the
run's own test cases are copied to RUN/evaluation.json and RUN/report.html.

The figure to quote is Dice over a whole case, a patient's volume or a picture: its mean, median and
deviation over cases. With several classes there are the figures of each, and a confusion matrix.
Per-slice and pooled figures stand under those names only, beside the baseline that calls everything
background. docs/metrics.md defines each figure.
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
        options.workdir,
        split=options.split,
        data=options.data,
        which=options.checkpoint,
        fit=[name for name, asked in fitted.items() if asked],
        group=options.group,
        out=options.out,
        changes=prediction_changes(),
    )


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'folder of a training run', required=True)
    flags.DEFINE_enum(
        'split', '', ['', 'train', 'validation', 'test'],
        "which cases; '': those of test (without any, of validation), and of --data all",
    )  # fmt: skip
    flags.DEFINE_string(
        'out', '', "folder for the results; '': in the run, one a split or data set"
    )
    flags.DEFINE_string('data', '', 'a folder with images/ and masks/, or kaggle_3m')
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as the config says")
    flags.DEFINE_string('group', None, f'of --data: {cli.GROUP}')
    flags.DEFINE_bool(
        'fit_temperature', False, 'fit it on --split=validation and keep it with the run'
    )
    flags.DEFINE_bool(
        'choose_postprocessing', False,
        'choose flip, threshold, components on --split=validation and keep them with the run',
    )  # fmt: skip
    define_prediction_flags(figures=True)
    cli.define_host_flags()
    cli.run(main)
