"""k-fold cross-validation by patient: every patient is tested once, by a model that never saw it.

  python -m experiments.crossval --config=configs/lgg.py --workdir=runs/cv [--folds=5] \\
      [--results=FILE] [--config.data.source=FOLDER ...]

Fold n is a run of `experiments.run` with data.split 'kfold' and data.fold n in WORKDIR/fold_n; its
line is added to WORKDIR/folds.jsonl. A finished fold is not run again; a stopped one is resumed. At
the end the line over all patients is printed and, with --results, added to FILE. With
--most_seconds=150 and a number of steps (--config.train.steps), all folds get fewer steps if the
first one shows that training would take longer. With --choose_postprocessing, each fold is tested
with the post-processing that was chosen on its own validation patients.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from experiments import run
from pspnet_jax import cli
from pspnet_jax.evaluation import metrics
from pspnet_jax.evaluation.scores import interval
from pspnet_jax.runtime.errors import ConfigError


class TooSlowError(Exception):
    """Training would take too long; the argument is the number of steps that fits."""


def raise_if_slow(steps: int, most_seconds: float) -> Callable[[int, dict[str, Any]], None]:
    """An `on_log` hook that measures the pace from the second to the fourth record of losses."""
    seen: list[tuple[int, float]] = []

    def on_log(step: int, values: dict[str, Any]) -> None:
        if 'loss' in values:
            seen.append((step, time.monotonic()))
        if len(seen) == 4:
            (first, start), (last, end) = seen[1], seen[3]
            allowed = int(most_seconds * (last - first) / (end - start))
            if allowed < steps:
                raise TooSlowError(allowed)

    return on_log


def over_patients(lines: list[dict[str, Any]], bootstrap: int = 10_000) -> dict[str, Any]:
    """Join the folds' lines into one, with statistics over all patients, not over folds."""
    patients = [patient for line in lines for patient in line['patients']]
    names = [patient['patient'] for patient in patients]
    if len(set(names)) < len(names):
        raise ValueError(f'a patient was tested twice: {sorted(names)}')
    summary = {}
    for name in ('dice', 'dice_largest', 'iou', 'hd95', 'hd95_joined', 'lesion_dice', 'lesion_f1'):
        found = [p.get(name) for p in patients]  # old lines lack the last three
        values = np.array([value for value in found if value is not None], np.float64)
        summary[name] = {
            'mean': float(values.mean()) if len(values) else None,
            'median': float(np.median(values)) if len(values) else None,
            'ci95': metrics.bootstrap_ci(values, resamples=bootstrap),
            'n': len(values),
        }
    same = ('config', 'overrides', 'commit', 'seed', 'device', 'versions')
    return {
        **{key: lines[0][key] for key in same},
        'folds': len(lines),
        'seconds': sum(line['seconds'] for line in lines),
        'summary': summary,
        'postprocessing': [line.get('postprocessing') for line in lines],
        'fold_dice': [line['summary']['dice']['mean'] for line in lines],
        'patients': patients,
    }


def run_fold(
    config: Any, folder: Path, fold: int, folds: int, most_seconds: float, choose: bool
) -> None:
    """Train and test one fold, and add its line to FOLDER/folds.jsonl."""
    fewer = folder / 'steps'  # for the other folds, and for this one if it is resumed
    changes = {'data.split': 'kfold', 'data.folds': folds, 'data.fold': fold}
    if fewer.exists():
        changes['train.steps'] = int(fewer.read_text())
    config.update_from_flattened_dict(changes)
    watch = most_seconds and not fewer.exists()
    hooks = {'on_log': raise_if_slow(config.train.steps, most_seconds)} if watch else {}
    texts = {key: str(value) for key, value in changes.items()}
    try:
        kept = folder / 'folds.jsonl'
        run.add_line(config, folder / f'fold_{fold}', kept, texts, choose, **hooks)
    except TooSlowError as too_slow:
        logging.warning('only %d steps fit into --most_seconds: all folds use that', *too_slow.args)
        fewer.write_text(str(*too_slow.args))
        run_fold(config, folder, fold, folds, most_seconds, choose)


def main() -> None:
    FLAGS = flags.FLAGS
    folder, config, folds = Path(FLAGS.workdir), FLAGS.config, FLAGS.folds
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / 'folds.jsonl'
    if FLAGS.most_seconds and not config.train.steps:
        raise ConfigError('--most_seconds needs a number of steps: add --config.train.steps=8000')
    for fold in range(folds):
        if f'fold_{fold}' not in {line['experiment'] for line in read(kept)}:
            print(f'fold {fold} of {folds}', flush=True)
            run_fold(
                config.copy_and_resolve_references(), folder, fold, folds, FLAGS.most_seconds,
                FLAGS.choose_postprocessing,
            )  # fmt: skip
    lines = sorted(read(kept), key=lambda line: line['experiment'])
    total = over_patients(lines)
    dice = total['summary']['dice']
    print(
        f'{len(total["patients"])} patients in {len(lines)} folds: Dice mean {dice["mean"]:.3f}, '
        f'median {dice["median"]:.3f}, {interval(dice)}; '
        f'by fold {", ".join(f"{x:.3f}" for x in total["fold_dice"])}'
    )
    if FLAGS.results:
        with open(FLAGS.results, 'a') as file:
            file.write(json.dumps({'experiment': folder.name, **total}) + '\n')


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'what to run: FILE or FILE:ARGUMENT')
    flags.DEFINE_string('workdir', None, 'gets one folder per fold, and their lines', required=True)
    flags.DEFINE_integer('folds', 5, 'number of parts of the patients', lower_bound=2)
    flags.DEFINE_float('most_seconds', 0, "limit of a fold's training; 0: none")
    flags.DEFINE_bool('choose_postprocessing', False, "on each fold's validation patients")
    flags.DEFINE_string('results', '', 'a .jsonl that gets the line over all folds')
    cli.run(main)
