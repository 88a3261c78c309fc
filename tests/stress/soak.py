"""A long run of small steps: memory stays, and nothing is left open.

  python -m tests.stress.soak [--steps=6000]

One process trains a tiny PSPNet on picture files that are read again for every batch, and
validates and saves often. Its memory, threads, files and children are read from outside twice a
second, its live arrays by the hook of the loop. Two hours of configs/lgg.py:vgg_pspnet on this
kind of machine (results/lgg.jsonl) are `lgg_two_hours` steps, and a run has ten validations, each
with a checkpoint: the line has how many times as much was done. It goes to
experiments/results/soak.jsonl.

What is known to grow: a little with each checkpoint. tensorstore 0.1.86 does not free what
`KvStore.Spec(...).to_json()` makes, which Orbax calls for every array.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from experiments.provenance import commit, device
from pspnet_jax.runtime import checkpoint, log

VALIDATE_EVERY = CHECKPOINT_EVERY = 100
LIMIT = 0.02  # that memory may grow from a fifth of the run to its end, of what it was
POOL = 'ts_pool_worker'
CRITERION = 'the median RSS of the last tenth is at most 2 % above that from 20 % to 30 %'


class Sample(NamedTuple):
    """A process at a moment; `fds` are its open files, `children` its processes.

    `pool` are tensorstore's threads, which it starts when it first needs so many and keeps.
    """

    step: int
    rss_kb: int
    threads: int
    fds: int
    children: int
    pool: int


def sample(pid: int, step: int) -> Sample:
    """From /proc. Raises OSError where there is no such process any more."""
    root = Path(f'/proc/{pid}')
    status = dict(line.split(':', 1) for line in (root / 'status').read_text().splitlines())
    names, children = [], []
    for task in root.glob('task/*'):
        with contextlib.suppress(OSError):  # a thread that has just ended
            names.append((task / 'comm').read_text().strip())
            children += (task / 'children').read_text().split()
    pool = names.count(POOL)
    fds = len(os.listdir(root / 'fd'))
    rss_kb = int(status['VmRSS'].split()[0])
    return Sample(step, rss_kb, len(names) - pool, fds, len(children), pool)


def last_step(path: Path) -> int:
    """Of metrics.jsonl, by its last whole line; 0 before there is one."""
    if not path.exists():
        return 0
    with path.open('rb') as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        lines = file.read().split(b'\n')[:-1]
    return json.loads(lines[-1])['step'] if lines else 0


def judge(samples: Sequence[Sample], steps: int) -> dict[str, Any]:
    """What grew: medians over a tenth of the run each, and a line through all behind a fifth.

    'constant' is CRITERION for memory, and that threads, files and children, the fewest seen in
    each tenth, did not become more.
    """

    def tenth(share: float) -> np.ndarray:
        part = [s[1:] for s in samples if share * steps <= s.step <= (share + 0.1) * steps]
        if not part:
            raise ValueError(f'no sample between step {share * steps} and a tenth further')
        return np.array(part)

    early, late = tenth(0.2), tenth(0.9)
    rss_mb = {
        f'{100 * share:.0f} %': round(float(np.median(tenth(share)[:, 0])) / 1024, 1)
        for share in (0.2, 0.5, 0.8, 0.9)
    }
    behind = np.array([(s.step, s.rss_kb) for s in samples if s.step >= 0.2 * steps])
    slope = np.polyfit(behind[:, 0], behind[:, 1], 1)[0]
    grown = float(np.median(late[:, 0]) / np.median(early[:, 0])) - 1
    names = ('threads', 'fds', 'children')
    counts = {n: [int(x.min()) for x in (early[:, i], late[:, i])] for i, n in enumerate(names, 1)}
    return {
        'rss_mb': rss_mb,
        'rss_grown': round(grown, 4),
        'kb_per_1000_steps': round(1000 * float(slope), 1),
        'criterion': CRITERION,
        **counts,
        'pool': [int(x[:, 4].max()) for x in (early, late)],
        'constant': grown <= LIMIT and all(after <= before for before, after in counts.values()),
    }


def train(folder: Path) -> None:
    """The run that is watched; its live arrays go to FOLDER/live.jsonl at each validation."""
    from pspnet_jax.config.folder import get_config
    from pspnet_jax.training.loop import train_and_evaluate

    changes = {
        'data.source': str(folder / 'data'),
        'data.group': r'(.+)_\d+',
        'data.cache': 'none',
        'model.backbone': 'resnet18',
        'model.width': 4,
        'augment.crop': 0,
        'train.batch_size': 4,
        'train.steps': flags.FLAGS.steps,
        'train.log_every': 1,
        'train.validate_every': VALIDATE_EVERY,
        'train.checkpoint_every': CHECKPOINT_EVERY,
        'train.ema_decay': 0.9,
        'eval.batch_size': 4,
        'eval.bootstrap': 50,
    }
    config = get_config()
    config.update_from_flattened_dict(changes)

    def count(step, dice, _):
        live = jax.live_arrays()
        facts = {'step': step, 'arrays': len(live), 'bytes': sum(x.nbytes for x in live)}
        with (folder / 'live.jsonl').open('a') as file:
            file.write(json.dumps(facts) + '\n')

    train_and_evaluate(config, str(folder / 'run'), on_validation=count)


def write_pictures(folder: Path) -> None:
    """Six patients of four slices of noise with a bright square, 32 x 32."""
    rng = np.random.default_rng(0)
    for kind in ('images', 'masks'):
        (folder / kind).mkdir(parents=True)
    for n in range(24):
        image, mask = rng.integers(0, 60, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
        row, column = rng.integers(0, 20, 2)
        mask[row : row + 10, column : column + 10] = 255
        image[mask > 0] += 150
        for kind, pixels in (('images', image), ('masks', mask)):
            Image.fromarray(pixels).save(folder / kind / f'p{n // 4}_{n % 4}.png')


def processes_of(session: int) -> list[int]:
    """Those that still run in a session."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = path.read_text().rpartition(')')[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session:
            found.append(int(path.parent.name))
    return found


def watch(folder: Path) -> tuple[list[Sample], dict[str, list[str]]]:
    """(samples, what is left) of a run in `folder`. Raises RuntimeError for one that fails."""
    temporary = folder / 'tmp'
    temporary.mkdir()
    before = set(os.listdir('/dev/shm'))
    with (folder / 'told.log').open('w') as file:
        run = subprocess.Popen(
            [sys.executable, '-m', 'tests.stress.soak', f'--inside={folder}',
             f'--steps={flags.FLAGS.steps}'],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {'TMPDIR': str(temporary)},
        )  # fmt: skip
    samples = []
    try:
        while run.poll() is None:
            step = last_step(folder / 'run' / 'metrics.jsonl')
            with contextlib.suppress(OSError, KeyError):  # where it has just ended
                if 0 < step < flags.FLAGS.steps:  # not the start, nor the evaluation at the end
                    samples.append(sample(run.pid, step))
            time.sleep(0.5)
        status = run.wait()
    finally:
        run.kill()
    if status:
        raise RuntimeError((folder / 'told.log').read_text(errors='replace')[-2000:])
    return samples, {
        'processes': [str(pid) for pid in processes_of(run.pid)],
        'shared memory': sorted(set(os.listdir('/dev/shm')) - before),
        'temporary files': sorted(str(p.relative_to(temporary)) for p in temporary.rglob('*')),
        'unfinished checkpoints': [
            p.name for p in (folder / 'run' / checkpoint.FOLDER).iterdir() if not p.name.isdigit()
        ],
    }


def lgg_steps(seconds: float) -> int:
    """Steps of configs/lgg.py:vgg_pspnet in so many seconds, with its validation and evaluation."""
    (line,) = (
        line
        for line in map(json.loads, Path('experiments/results/lgg.jsonl').read_text().splitlines())
        if line['experiment'] == 'lgg_vgg_pspnet'
    )
    return round(seconds * line['step'] / line['seconds'])


def main(_: Sequence[str]) -> None:
    if flags.FLAGS.inside:
        train(Path(flags.FLAGS.inside))
        return
    made_by, start = commit(), time.time()
    folder = Path(tempfile.mkdtemp())
    try:
        write_pictures(folder / 'data')
        samples, left = watch(folder)
        live = [json.loads(line) for line in (folder / 'live.jsonl').read_text().splitlines()]
        records = log.read(folder / 'run')
    finally:
        shutil.rmtree(folder)
    verdict = judge(samples, flags.FLAGS.steps)
    early, late = live[len(live) // 5], live[-1]
    grown = [name for name in ('arrays', 'bytes') if late[name] > early[name]]
    leaked = {name: found for name, found in left.items() if found}
    line = {
        'constant': verdict.pop('constant') and not grown and not leaked,
        'steps': flags.FLAGS.steps,
        'validations': sum('validation/dice' in record for record in records),
        'checkpoints': flags.FLAGS.steps // CHECKPOINT_EVERY,
        'seconds': round(time.time() - start, 1),
        'lgg_two_hours': lgg_steps(7200),
        **verdict,
        'live_arrays': [early['arrays'], late['arrays']],
        'live_mb': [round(x['bytes'] / 2**20, 3) for x in (early, late)],
        'left': leaked or 'nothing',
        'samples': len(samples),
        'commit': made_by,
        'command': f'python -m tests.stress.soak --steps={flags.FLAGS.steps}',
        'device': device(),
        'versions': {'jax': jax.__version__},
    }
    print(json.dumps(line))
    with open('experiments/results/soak.jsonl', 'a') as file:
        file.write(json.dumps(line) + '\n')
    if not line['constant']:
        sys.exit(1)


def define_flags() -> None:
    flags.DEFINE_integer('steps', 6000, 'small ones', lower_bound=100)
    flags.DEFINE_string('inside', '', 'a folder to train in: how this starts itself')


if __name__ == '__main__':
    define_flags()
    app.run(main)
