"""Predict masks and pictures for images, volumes and videos.

  python -m pspnet_jax.predict --workdir=RUN --input=FILE_FOLDER_GLOB_OR_CAMERA --output=FOLDER
  python -m pspnet_jax.predict --workdir=RUN1,RUN2,RUN3 --input=SCANS --output=MASKS --flip

For each image NAME it writes what --save lists, at the image's own size:

  mask         NAME_mask.png: 0 and 255, or with more than two classes their numbers, with a
               palette that shows them in colour
  probability  NAME_probability.png: of class 1, where 65535 means 1; with more classes one file
               per class
  overlay      NAME_overlay.png: classes in colour, with their names
  outline      NAME_outline.png: each class in its colour, with a black line next to it
  panels       NAME_panels.png: original, mask and outline, with captions and a legend

A volume (NIfTI, DICOM, pages of a TIFF, array) gives a mask and probabilities in its own format,
size, spacing and orientation, and pictures of the slice with the largest prediction. A video, or a
camera by its number, gives videos: .mp4, and lossless .mkv for masks and probabilities.

Each file is predicted separately, unless the run was trained on patients with several files
(data.group, LGG) or --group is given. Then the files of a patient share an intensity scale, and
files with a number in (?P<slice>...) are slices of one volume.

The output folder also gets pspnet_predictions.jsonl, which records each result's source, run, step
and options. Repeating the command skips finished files. Files from other commands are replaced
only with --overwrite. A summary at the end counts every file.
"""

import os
from pathlib import Path

from absl import flags

from pspnet_jax import cli
from pspnet_jax.config.flags import define_prediction_flags, prediction_changes
from pspnet_jax.runtime.errors import ConfigError, DataError, say


def main() -> None:
    from pspnet_jax.inference import predictors
    from pspnet_jax.prediction.folders import predict_files
    from pspnet_jax.prediction.results import KINDS
    from pspnet_jax.prediction.videos import predict_video

    options = flags.FLAGS
    workdirs = cli.workdirs(options.workdir)
    if wrong := [kind for kind in options.save if kind not in KINDS]:
        raise ConfigError(f'--save={",".join(wrong)} is not known: give some of {",".join(KINDS)}')
    changes, group = prediction_changes(), options.group
    if options.input.isdigit() and not os.path.exists(options.input):
        output, name = Path(options.output).expanduser(), f'camera_{options.input}'
        if not options.overwrite and list(output.glob(f'{name}_*')):
            raise ConfigError(f'{output / name}_* exists: give another --output, or --overwrite')
        predictor = predictors.load(workdirs, options.checkpoint, changes)
        camera = int(options.input)
        done = predict_video(
            predictor, camera, output / name, save=options.save, limit=options.frames
        )
        say(str(done))
        return
    faults = predict_files(
        workdirs,
        options.input,
        options.output,
        options.checkpoint,
        save=options.save,
        overwrite=options.overwrite,
        changes=changes,
        group=group,
    )
    if faults:
        raise DataError(f'{len(faults)} file(s) failed:', faults)


if __name__ == '__main__':
    flags.DEFINE_multi_string('workdir', None, cli.WORKDIRS, required=True)
    flags.DEFINE_string(
        'input', None, 'file, folder, pattern, or number of a camera', required=True
    )
    flags.DEFINE_string('output', None, 'folder for the results', required=True)
    flags.DEFINE_string('checkpoint', '', "'best', 'last' or a step; '': as in the config")
    flags.DEFINE_list('save', 'mask,overlay,panels', 'which of the results above')
    flags.DEFINE_string('group', None, cli.GROUP)
    flags.DEFINE_bool('overwrite', False, 'predict finished files again, and replace others')
    flags.DEFINE_integer('frames', 0, 'number of frames from a camera; 0: until Ctrl-C')
    define_prediction_flags(figures=False)
    cli.define_host_flags()
    cli.run(main)
