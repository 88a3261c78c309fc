"""Evaluate a finished run, or a network of the zoo, and add its line to a results file.

  python -m experiments.score --workdir=zoo:lgg --data=FOLDER/kaggle_3m --split=test \\
      --out=runs/zoo_lgg --results=experiments/results/zoo.jsonl

Several workdirs, RUN1,RUN2,RUN3, are evaluated as an ensemble. The line has the commit and the
device of the evaluation, and flags such as --flip; --trained names the line of the training.
"""

import json
import sys
import time
from pathlib import Path

from absl import flags

from experiments.provenance import commit
from experiments.run import found, overrides
from pspnet_jax import cli
from pspnet_jax.config.flags import define_prediction_flags, prediction_changes
from pspnet_jax.evaluation.protocol import evaluate_checkpoint


def main() -> None:
    options, start, made_by = flags.FLAGS, time.time(), commit()
    workdirs, changes = cli.workdirs(options.workdir), prediction_changes()
    if options.choose_postprocessing:  # on the run's own data
        evaluate_checkpoint(workdirs, split='validation', fit=['postprocessing'], changes=changes)
    given = {'split': options.split, 'data': options.data, 'out': options.out}
    result = evaluate_checkpoint(workdirs, **given, changes=changes)
    config = result['checkpoint']['config']
    line = {
        'experiment': options.name or ','.join(workdirs),
        'config': f'{config["model"]["name"]}:{config["model"]["backbone"]}',
        'overrides': overrides(sys.argv),
        'prediction': changes,
        'commit': made_by,
        'seed': config['seed'],
        'trained': options.trained,
        'seconds': round(time.time() - start, 1),
        **found(result, config['data']['name']),
    }
    with Path(options.results).open('a') as file:
        file.write(json.dumps(line) + '\n')
    print(f'line added to {options.results}')


if __name__ == '__main__':
    flags.DEFINE_multi_string('workdir', None, cli.WORKDIRS, required=True)
    flags.DEFINE_string('results', None, 'the .jsonl that gets the line', required=True)
    flags.DEFINE_string('data', '', 'kaggle_3m, or a folder with images/ and masks/')
    flags.DEFINE_enum('split', '', ['', 'train', 'validation', 'test'], 'which cases')
    flags.DEFINE_string('out', '', 'folder for the report')
    flags.DEFINE_string('name', '', "the experiment's name in the line; '': the workdir")
    flags.DEFINE_string('trained', '', 'the line of the training: FILE, experiment NAME')
    flags.DEFINE_bool('choose_postprocessing', False, 'on the validation cases first')
    define_prediction_flags(figures=True)
    cli.run(main)
