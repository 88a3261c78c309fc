"""k-fold cross-validation by patient: every patient is tested once, by a model that never saw it.

  python -m experiments.crossval --config=configs/lgg.py --workdir=runs/cv [--folds=5] \\
      [--results=FILE] [--config.data.source=FOLDER ...]

Fold n is `experiments.run` with data.split 'kfold' and data.fold n, in WORKDIR/fold_n; its line
goes to WORKDIR/folds.jsonl. A fold whose line is there is not run again, one that was stopped
goes on. At the end the line over all patients is printed and, if asked for, added to FILE.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from pspnet_jax import metrics

WORKDIR = flags.DEFINE_string('workdir', None, 'a folder a fold, and their lines', required=True)
CONFIG = flags.DEFINE_string('config', None, 'what to run: FILE or FILE:ARGUMENT', required=True)
FOLDS = flags.DEFINE_integer('folds', 5, 'parts of the patients', lower_bound=2)
RESULTS = flags.DEFINE_string('results', '', 'a .jsonl that gets the line over all folds')


def over_patients(lines: list[dict[str, Any]], bootstrap: int = 10_000) -> dict[str, Any]:
    """One line of the folds' lines: each statistic over all patients, not over folds."""
    patients = [patient for line in lines for patient in line['patients']]
    names = [patient['patient'] for patient in patients]
    if len(set(names)) < len(names):
        raise ValueError(f'a patient was tested twice: {sorted(names)}')
    summary = {}
    for name in ('dice', 'dice_largest', 'iou', 'hd95'):
        values = np.array([p[name] for p in patients if p[name] is not None], np.float64)
        summary[name] = {
            'mean': float(values.mean()) if len(values) else None,
            'median': float(np.median(values)) if len(values) else None,
            'ci95': metrics.bootstrap_ci(values, resamples=bootstrap) if len(values) else None,
            'n': len(values),
        }
    same = ('config', 'overrides', 'commit', 'seed', 'device', 'versions')
    return {
        **{key: lines[0][key] for key in same},
        'folds': len(lines),
        'seconds': sum(line['seconds'] for line in lines),
        'summary': summary,
        'fold_dice': [line['summary']['dice']['mean'] for line in lines],
        'patients': patients,
    }


def main(argv: list[str]) -> None:
    folder = Path(WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / 'folds.jsonl'
    for fold in range(FOLDS.value):
        if f'fold_{fold}' in {line['experiment'] for line in read(kept)}:
            continue
        command = [
            sys.executable, '-m', 'experiments.run', f'--config={CONFIG.value}',
            f'--workdir={folder}/fold_{fold}', f'--results={kept}', *argv[1:],
            '--config.data.split=kfold', f'--config.data.folds={FOLDS.value}',
            f'--config.data.fold={fold}',
        ]  # fmt: skip
        print(f'fold {fold} of {FOLDS.value}', flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            sys.exit(status)
    lines = sorted(read(kept), key=lambda line: line['experiment'])
    total = over_patients(lines)
    dice = total['summary']['dice']
    print(
        f'{len(total["patients"])} patients in {len(lines)} folds: Dice mean {dice["mean"]:.3f}, '
        f'median {dice["median"]:.3f}, 95 % interval {dice["ci95"][0]:.3f} to '
        f'{dice["ci95"][1]:.3f}; by fold {", ".join(f"{x:.3f}" for x in total["fold_dice"])}'
    )
    if RESULTS.value:
        with open(RESULTS.value, 'a') as file:
            file.write(json.dumps({'experiment': folder.name, **total}) + '\n')


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == '__main__':
    app.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
