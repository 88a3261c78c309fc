"""Kill a training run at random moments, start it again, and compare with one never stopped.

  python -m tests.stress.chaos [--kills=24] [--seed=0]

`python -m pspnet_jax.main` on tiny phantoms, ended by SIGKILL while it starts, compiles, steps,
saves, validates and evaluates: which of these is seen from outside, by what the run has written.
All arrays of all checkpoints must be equal to the bit, metrics.jsonl and evaluation.json byte for
byte, and no other file may be left. After each kill the best checkpoint must be there, and be the
one that readers take; then each checkpoint gets a file of metrics, as earlier versions wrote one,
with a wrong Dice. Two readers load from the run that is never stopped while it is written. A line
is added to experiments/results/chaos.jsonl.
"""

import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from orbax.checkpoint import v1 as ocp

from experiments.provenance import commit, device
from pspnet_jax.inference.runs import open_run
from pspnet_jax.runtime import checkpoint, log
from pspnet_jax.runtime.errors import CheckpointError

CONFIG = {
    'config': 'configs/phantom.py',
    'model.width': 4,
    'phantom.volumes': 6,
    'phantom.slices': 4,
    'phantom.size': 32,
    'train.batch_size': 4,
    'train.steps': 600,
    'train.log_every': 1,
    'train.validate_every': 40,
    'train.checkpoint_every': 20,
    'train.ema_decay': 0.9,
    'optim.warmup_steps': 4,
    'eval.batch_size': 4,
    'eval.bootstrap': 50,
}
# Phase: the longest delay of a kill behind its begin, in seconds, and its share of the kills.
PHASES = {
    'start': (4.0, 2),
    'compile': (10.0, 4),
    'step': (0.5, 6),
    'save': (0.7, 7),
    'validation': (0.1, 3),
    'evaluation': (2.0, 2),
}
# Loads a run so many times from its first checkpoint on, and prints a line each.
READER = """
import json, sys, time
from pspnet_jax.inference.runs import open_run
from pspnet_jax.runtime import checkpoint

_, workdir, loads = sys.argv
while not checkpoint.steps(workdir):
    time.sleep(0.01)
for n in range(int(loads)):
    line = {'which': ('best', 'last')[n % 2]}
    try:
        run = open_run(workdir, line['which'])
        line |= {'step': run.step, 'fault': ', '.join(run.passed_over.values())}
    except Exception as error:
        line |= {'step': None, 'fault': str(error)}
    print(json.dumps(line), flush=True)
"""
METRICS = 'metrics/metrics'  # of a checkpoint, by versions before the Dice was sealed


def command(workdir: str | Path, config: Mapping[str, object]) -> list[str]:
    """The training command for the file `config['config']`, with the other values changed."""
    changes = [f'--config.{key}={value}' for key, value in config.items() if key != 'config']
    main = [sys.executable, '-m', 'pspnet_jax.main', f'--config={config["config"]}']
    return [*main, f'--workdir={workdir}', *changes]


def phase_of(workdir: Path, told: str, config: Mapping[str, object]) -> str:
    """What a run does, by the files in its folder and what it `told` on stderr."""
    if not re.search('compiling the training step|training is complete', told):
        return 'start'
    last = (log.read(workdir) or [{'step': 0}])[-1]
    if last['step'] == config['train.steps'] and 'loss' not in last and not unfinished(workdir):
        return 'evaluation'
    if 'compiled in' not in told:
        return 'compile'
    if unfinished(workdir):
        return 'save'
    validated = last['step'] % config['train.validate_every'] or 'loss' not in last
    return 'step' if validated else 'validation'


def unfinished(workdir: Path) -> list[str]:
    """Names in the folder of checkpoints that are not those of whole steps."""
    folder = workdir / checkpoint.FOLDER
    return [name for name in os.listdir(folder) if not name.isdigit()] if folder.exists() else []


def run_until(
    aim: str,
    delay: float,
    nth: int,
    workdir: Path,
    config: Mapping[str, object],
    environment: Mapping[str, str],
) -> str:
    """Start or go on, and kill `delay` seconds behind the begin of the nth phase `aim`.

    Returns the phase in which it was, '' where the run came to its end; with no `aim` it does.
    Raises RuntimeError for one that ends in an error.
    """
    told = workdir.with_suffix('.log')
    with told.open('w') as file:
        run = subprocess.Popen(
            command(workdir, config), stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    before, seen, due = '', 0, float('inf')
    try:
        while run.poll() is None:
            phase = phase_of(workdir, told.read_text(errors='replace'), config)
            seen += phase == aim != before
            if phase == aim and seen == nth and phase != before:
                due = time.monotonic() + delay
            before = phase
            if time.monotonic() >= due:
                run.send_signal(signal.SIGSTOP)  # so that what is seen is what is killed
                phase = phase_of(workdir, told.read_text(errors='replace'), config)
                run.kill()
                if run.wait() == -signal.SIGKILL:
                    return phase
            time.sleep(0.002)
    finally:
        run.kill()
        run.wait()
    if run.returncode:
        tail = told.read_text(errors='replace')[-2000:]
        raise RuntimeError(f'the run ended with status {run.returncode}:\n{tail}')
    return ''


def kill_often(
    workdir: Path,
    config: Mapping[str, object],
    quota: Mapping[str, int],
    *,
    seed: int,
    environment: Mapping[str, str],
    dice: Mapping[int, float],
) -> tuple[dict[str, int], list[str]]:
    """({phase: kills}, what was wrong after them) of a run that then came to its end.

    At least `quota` of each. The first compilations are the real ones: those kills come first,
    those in the evaluation last. `dice` are the figures of the run that is never stopped.
    """
    rng, done, wrong = np.random.default_rng(seed), collections.Counter(), []
    for _ in range(3 * sum(quota.values())):
        missing = [phase for phase in quota if done[phase] < quota[phase]]
        if not missing:
            break
        between = [phase for phase in missing if phase not in ('compile', 'evaluation')]
        aim = 'compile' if 'compile' in missing else str(rng.choice(between or missing))
        delay, nth = rng.uniform(0, PHASES[aim][0]), int(rng.integers(1, 3))
        nth = nth if aim in ('step', 'save') else 1
        phase = run_until(aim, delay, nth, workdir, config, environment)
        print(f'aimed at {aim}, {delay:.3f} s: killed in {phase or "nothing"}', flush=True)
        done.update([phase] if phase else [])
        wrong += [f'{fault}, killed in {phase}' for fault in faults_of_the_best(workdir, dice)]
        damage_metrics(workdir)
        if not phase and aim != 'evaluation':
            raise RuntimeError(f'the run was over before it was killed often enough: {dict(done)}')
    else:
        raise RuntimeError(f'killed {dict(done)}, which is not {dict(quota)}')
    run_until('', 0, 0, workdir, config, environment)
    return dict(done), [*wrong, *faults_of_the_best(workdir, dice), *faults_of_metrics(workdir)]


def dice_of(workdir: Path) -> dict[int, float]:
    """{step: Dice} of the validations, by metrics.jsonl."""
    records = ((record['step'], record.get('validation/dice')) for record in log.read(workdir))
    return {step: dice for step, dice in records if dice is not None}


def faults_of_the_best(workdir: Path, dice: Mapping[int, float]) -> list[str]:
    """What is not as `dice`, {step: Dice} of the same run never stopped, has it: the best step must
    be there and be taken, and sealed metadata and metrics.jsonl must have these figures.
    """
    there, logged = checkpoint.steps(workdir), dice_of(workdir)
    if not there:
        return []
    so_far = {step: value for step, value in dice.items() if step <= there[-1]}
    best, run, found = checkpoint.best(so_far) or there[-1], open_run(workdir), []
    if run.step != best:
        found.append(f'of {there} the best is {best}, and {run.step} is taken')
    for step in there:
        with contextlib.suppress(CheckpointError):  # a deletion was cut off
            sealed = checkpoint.metadata(workdir, step)['dice']
            if not sealed == logged.get(step) == dice.get(step):
                found.append(f'step {step} has Dice {sealed}, not {dice.get(step)}')
    return found


def damage_metrics(workdir: Path) -> None:
    """Give each checkpoint a file of metrics by which the best is the worst, as by flipped bits."""
    for step in checkpoint.steps(workdir):
        with contextlib.suppress(CheckpointError):
            if (dice := checkpoint.metadata(workdir, step)['dice']) is not None:
                path = workdir / checkpoint.FOLDER / str(step) / METRICS
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps({'dice': 5 - dice}))


def faults_of_metrics(workdir: Path) -> list[str]:
    """Files of metrics that contradict the sealed metadata beside them."""
    return [
        f'{path} is {path.read_text()}'
        for step in checkpoint.steps(workdir)
        if (path := workdir / checkpoint.FOLDER / str(step) / METRICS).exists()
        and json.loads(path.read_text()) != {'dice': checkpoint.metadata(workdir, step)['dice']}
    ]


def differences(ours: Path, theirs: Path) -> list[str]:
    """What is not the same to the bit in two folders of one run, and what is left over."""
    sides = []
    for folder in (ours, theirs):
        files = {str(p.relative_to(folder)): p for p in folder.rglob('*') if p.is_file()}
        elsewhere = (checkpoint.FOLDER, 'tensorboard')  # seen below; times
        sides.append({k: v for k, v in files.items() if not k.startswith(elsewhere)})
    found = [f'{name} is left' for name in unfinished(ours)]
    found += [f'{name} is in one only' for name in sorted(sides[0].keys() ^ sides[1].keys())]
    for name in sorted(sides[0].keys() & sides[1].keys()):
        if timeless(sides[0][name]) != timeless(sides[1][name]):
            found.append(f'{name} differs')
    steps = checkpoint.steps(ours), checkpoint.steps(theirs)
    if steps[0] != steps[1]:
        return [*found, f'steps {steps[0]} and {steps[1]}']
    for step in steps[0]:
        metadata = [checkpoint.metadata(folder, step) for folder in (ours, theirs)]
        if metadata[0] != metadata[1]:
            found.append(f'metadata of step {step} differs')
        arrays = [read_arrays(folder, step) for folder in (ours, theirs)]
        for name in sorted(arrays[0].keys() | arrays[1].keys()):
            a, b = (side.get(name) for side in arrays)
            if a is None or b is None or a.dtype != b.dtype or a.tobytes() != b.tobytes():
                found.append(f'step {step}: {name} differs')
    return found


def timeless(path: Path) -> bytes:
    """The bytes of a file; of a report without the time and folder at its head."""
    found = path.read_bytes()
    if path.name == 'report.html':
        found = re.sub(rb'<title>[^<]*|<h1>[^<]*|, evaluated [^<]*|--workdir=[^ <]*', b'', found)
    return found


def read_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, read without our own code."""
    path = workdir.absolute() / checkpoint.FOLDER / str(step)
    parts = checkpoint.metadata(workdir, step)['sha256']
    tree = ocp.load_checkpointables(path, dict.fromkeys(parts))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}


def main(_: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells all it does
    options, made_by, start = flags.FLAGS, commit(), time.time()
    share = options.kills / sum(count for _, count in PHASES.values())
    quota = {phase: max(round(share * count), 1) for phase, (_, count) in PHASES.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        caches = [{'JAX_COMPILATION_CACHE_DIR': str(folder / f'cache{n}')} for n in range(2)]
        whole, killed = folder / 'whole', folder / 'killed'
        readers = [
            subprocess.Popen(
                [sys.executable, '-c', READER, whole, '20'],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for _ in range(2)
        ]
        try:
            run_until('', 0, 0, whole, CONFIG, os.environ | caches[0])
            print(f'the run that is never stopped took {time.time() - start:.0f} s', flush=True)
            told = [
                json.loads(line) for each in readers for line in each.communicate()[0].splitlines()
            ]
        finally:
            for reader in readers:
                reader.kill()
        kills, wrong = kill_often(
            killed,
            CONFIG,
            quota,
            seed=options.seed,
            environment=os.environ | caches[1],
            dice=dice_of(whole),
        )
        found = [
            *(f'a reader: {line["fault"]}' for line in told if line['fault']),
            *wrong,
            *differences(killed, whole),
        ]
        lines = (folder / 'killed' / 'metrics.jsonl').read_text().splitlines()
        arrays = len(read_arrays(folder / 'whole', checkpoint.steps(folder / 'whole')[-1]))
    line = {
        'kills': sum(kills.values()),
        'bitwise_equal': not found,
        'seconds': round(time.time() - start, 1),
        'commit': made_by,
        'by_phase': kills,
        'lost': found or 'nothing',
        'arrays': arrays,
        'metrics_lines': len(lines),
        'loads': len(told),
        'steps_loaded': len({line['step'] for line in told}),
        'seed': options.seed,
        'command': f'python -m tests.stress.chaos --kills={options.kills} --seed={options.seed}',
        'config': CONFIG,
        'device': device(),
        'versions': {'jax': jax.__version__},
    }
    print(json.dumps(line))
    with open('experiments/results/chaos.jsonl', 'a') as file:
        file.write(json.dumps(line) + '\n')
    if found:
        sys.exit(1)


def define_flags() -> None:
    flags.DEFINE_integer('kills', 24, 'at least so many', lower_bound=1)
    flags.DEFINE_integer('seed', 0, 'of the moments')


if __name__ == '__main__':
    define_flags()
    app.run(main)
