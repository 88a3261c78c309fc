"""Run an experiment and add its line to a results file.

  python -m experiments.run --config=configs/lgg.py:vgg_pspnet --workdir=runs/vgg \\
      --results=experiments/results/lgg.jsonl --config.data.source=FOLDER ...

The line holds what was run (config, overrides, commit, seed, device, seconds of training and
evaluation) and the results (summary, patients). For a changed working tree, '+changes' follows the
commit. With --choose_postprocessing, the results use the post-processing that was chosen on the
validation patients, and the line contains it.
"""

import json
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from experiments.provenance import commit, device
from pspnet_jax import cli
from pspnet_jax.evaluation.protocol import evaluate_checkpoint
from pspnet_jax.runtime import checkpoint
from pspnet_jax.training.loop import train_and_evaluate

LOCAL_PATHS = (  # keys with paths that only make sense on this machine
    'data.source', 'data.root', 'model.pretrained', 'train.init_from', 'distill.teacher',
)  # fmt: skip


def overrides(argv: list[str]) -> dict[str, str]:
    """The config changes of the command line; of local paths only the last part."""
    pairs = (re.fullmatch(r'--?config\.([\w.]+)=(.*)', argument) for argument in argv)
    found = {pair[1]: pair[2] for pair in pairs if pair}
    return {
        key: f'.../{Path(value).name}' if key in LOCAL_PATHS and '/' in value else value
        for key, value in found.items()
    }


def make_line(
    config: Any, workdir: str | Path, name: str, changes: dict[str, str], choose: bool = False,
    **hooks: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train, evaluate and return the result line; `name` and `changes` describe the config.

    With `choose`, post-processing is chosen on validation and used in the evaluation.
    """
    start, made_by = time.time(), commit()
    first_step = max(checkpoint.steps(workdir), default=0)  # above 0 if the run is resumed
    result = train_and_evaluate(config, str(workdir), **hooks)
    if choose:
        evaluate_checkpoint(workdir, split='validation', fit=['postprocessing'], trusted=True)
        result = evaluate_checkpoint(workdir, split=result['data']['split'], trusted=True)
    about = {
        'experiment': Path(workdir).name,
        'config': name,
        'overrides': changes,
        'commit': made_by,
        'seed': config.seed,
        'seconds': round(time.time() - start, 1),
        'first_step': first_step,
    }
    return about | found(result, config.data.name)


def found(result: dict[str, Any], source: str) -> dict[str, Any]:
    """What a line has of an evaluation, and of where it was made."""
    return {
        'device': device(),
        'versions': {'python': platform.python_version(), 'jax': jax.__version__},
        'step': result['checkpoint']['step'],
        'postprocessing': result['postprocessing'],
        'data': {**result['data'], 'source': source},
        'summary': result['summary'],
        'baseline': result['baseline'],
        'patients': result['patients'],
    }


def add_line(
    config: Any, workdir: str | Path, results: str | Path, changes: dict[str, str],
    choose: bool = False, **hooks: Any,
) -> None:  # fmt: skip
    """Run and add the line; `changes` are overrides that are not on the command line."""
    name = next(a.split('=', 1)[1] for a in sys.argv if re.match(r'--?config=', a))
    line = make_line(config, workdir, name, overrides(sys.argv) | changes, choose, **hooks)
    with open(results, 'a') as file:
        file.write(json.dumps(line) + '\n')


def main() -> None:
    FLAGS = flags.FLAGS
    choose = FLAGS.choose_postprocessing
    add_line(FLAGS.config, FLAGS.workdir, FLAGS.results, {}, choose)
    print(f'line added to {FLAGS.results}')


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'what to run: FILE or FILE:ARGUMENT')
    flags.DEFINE_string('workdir', None, 'checkpoints, metrics, evaluation', required=True)
    flags.DEFINE_string('results', None, 'the .jsonl that gets the line', required=True)
    flags.DEFINE_bool('choose_postprocessing', False, 'on validation, before the evaluation')
    cli.run(main)
