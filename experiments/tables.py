"""Write the tables in the docs from the committed lines in experiments/results.

  python -m experiments.tables

Each table is between `<!-- table: NAME -->` and `<!-- end -->`; tests/test_readme.py checks that
the pages are up to date.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablation import BASE, STUDIES
from pspnet_jax.config import base, flatten
from pspnet_jax.data import splits
from pspnet_jax.evaluation import metrics
from tests.stress.faults import FAULTS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / 'experiments/results'


def read_lines(name: str) -> list[dict[str, Any]]:
    """The lines of results/NAME.jsonl, none if there is no such file."""
    path = RESULTS / f'{name}.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lgg() -> str:
    """Dice and HD95 on the ten held-out patients, as trained and with what validation patients
    chose, and each run's command.
    """
    rows = [
        '| config | chosen | Dice mean | median | 95 % interval | HD95, voxels |',
        '|---|---|---:|---:|---:|---:|',
    ]
    notes, chosen = [], {line['trained']: line for line in read_lines('lgg_chosen')}
    for line in read_lines('lgg'):
        better = chosen.get(f'lgg.jsonl, {line["config"]}, seed {line["seed"]}')
        for one, options in ((line, {}), (better, better and better['postprocessing']['options'])):
            if one is None:
                continue
            dice, hd95 = one['summary']['dice'], one['summary']['hd95']
            ends = ' to '.join(f'{end:.3f}' for end in dice['ci95'] or ()) or 'none'
            told = ', '.join(f'{key} {value}' for key, value in options.items() if value)
            network = line['overrides'].get('model.backbone', '')
            rows.append(
                f'| {line["config"].removeprefix("configs/")}{" on " * bool(network)}{network} | '
                f'{told.replace(" True", "")} | {dice["mean"]:.3f} | {dice["median"]:.3f} | '
                f'{ends} | {hd95["mean"]:.1f} |'
            )
        flags = [
            f'--workdir=runs/{line["experiment"]}',
            '--results=experiments/results/lgg.jsonl',
            *(f'--config.{key}={value}' for key, value in line['overrides'].items()),
        ]
        notes.append(
            f'- {line["config"]}, commit {_short(line)}, seed {line["seed"]}, '
            f'{line["device"]}, step {line["step"]}: `python -m experiments.run '
            f'--config={line["config"]} {" ".join(flags)}`'
        )
    command = 'python -m experiments.score --workdir=RUN --choose_postprocessing --split=test ...'
    return '\n'.join([*rows, '', *notes, f'- Chosen: {_made_by(command, [*chosen.values()])}'])


# Published parameters for 21 classes, their precision, and the source.
PUBLISHED = {
    'fcn32s': (134e6, 1e6, 'Long 2015, table 3'),
    'fcn': (35_322_218, 1, 'torchvision, fcn_resnet50'),
    'segnet': (29.45e6, 0.01e6, 'Badrinarayanan 2017, table 6'),
    'deeplab_v1': (20.5e6, 0.1e6, 'Chen 2015, table 2'),
}
PUBLISHED_OTHERWISE = {
    'vgg_pspnet_blog': '17,093,442 for K = 2, statistics included (image-segmentation-keras)'
}


def architectures() -> str:
    """Parameters, cost and the phantom Dice of every network."""
    trained = {
        line['experiment'].removeprefix('phantom_'): line
        for line in read_lines('architectures')
        if line['experiment'].startswith('phantom_')
    }
    dice = {name: line['summary']['dice']['mean'] for name, line in trained.items()}
    steps = [line['step'] for line in trained.values()]
    least, most = min(steps, default=0), max(steps, default=0)
    lines = read_lines('costs')
    rows = [
        '| name | backbone | parameters, K = 2 | K = 21 | published | GFLOP a slice | '
        'ms a slice | phantom Dice |',
        '|---|---|---:|---:|---|---:|---:|---:|',
    ]
    for line in lines:
        name = line['name']
        number, unit, where = PUBLISHED.get(name, (0, 0, ''))
        published = f'{number:,.0f} ({where})' if unit == 1 else f'{number / 1e6:g} M ({where})'
        rows.append(
            f'| {name} | {line["backbone"]} | {line["parameters"]["2"]:,} | '
            f'{line["parameters"]["21"]:,} | '
            f'{published if number else PUBLISHED_OTHERWISE.get(name, "")} | '
            f'{line["gflop"]:.1f} | {line["ms"]:.0f} | '
            f'{f"{dice[name]:.3f}" if name in dice else ""} |'
        )
    if lines:
        first = lines[0]
        rows += [
            '',
            f'Inference at {first["size"]}x{first["size"]}, batch {first["batch"]}, float32 '
            f'(`python -m experiments.architectures --cost`, commit {_short(first)}, '
            f'{first["device"]}); published counts are for K = 21 where nothing else is said. '
            "Per-volume Dice on the phantoms' six test volumes, half-width networks from random "
            f'weights, {least} to {most} steps (`python -m experiments.architectures --quick`; '
            'experiments/results/architectures.jsonl has the commit and overrides of each).',
        ]
    return '\n'.join(rows)


def speed() -> str:
    """Images per second of ours and of the peer, the newest line of each case and device."""
    newest = {(line['case'], line['device']): line for line in read_lines('speed')}
    rows = [
        '| case | ours, images/s | peer | ratio | p95 of a step, s, ours and peer | '
        'peak MB | of the process | ready in, s |',
        '|---|---:|---|---:|---:|---:|---:|---:|',
    ]
    for line in newest.values():
        memory, process, ready = (
            f'{line[key]["ours"]:.0f}, {line[key]["peer"]:.0f}'
            for key in ('peak_memory_mb', 'peak_process_mb', 'compile_seconds')
        )
        p95 = f'{line["p95"]["ours"]:.2f}, {line["p95"]["peer"]:.2f}'
        rows.append(
            f'| {line["case"]} | {line["ours"]:.2f} | {line["peer"]:.2f} ({line["peer_is"]}) | '
            f'{line["ratio"]:.2f} | {p95} | {memory} | {process} | {ready} |'
        )
    note = (
        'Medians of turns taken one after the other; the same parameters and, with the same '
        'weights, the same output. The peer is the fastest of PyTorch eager and compiled, '
        'channels last and not. Peak memory is the resident set while steps are done, that of '
        'the process has imports and compilation too; ready in: compilation, for the peer its '
        'first step.'
    )
    made_by = _made_by('python -m experiments.benchmarks.speed', list(newest.values()))
    return '\n'.join([*rows, '', f'{made_by} {note}'])


def forms() -> str:
    """The training step with and without each optimised form: the newest lines."""
    rows = ['| step | s | compiled in, s | GFLOP | temporaries, MB |', '|---|---:|---:|---:|---:|']
    lines = list({line['variant']: line for line in read_lines('forms')}.values())
    for line in lines:
        rows.append(
            f'| {line["variant"]} | {line["seconds"]:.2f} | {line["compile_seconds"]:.1f} | '
            f'{line["gflop"]:.0f} | {line["temporary_mb"]:.0f} |'
        )
    return '\n'.join([*rows, '', _made_by('python -m experiments.benchmarks.forms', lines)])


def input_rates() -> str:
    """The loader compared with the step, and with growing data: the newest lines."""
    rows = [
        '| | cache | loader, slices/s | step, slices/s | waiting | volumes, slices/s | peak MB |',
        '|---|---|---:|---:|---:|---:|---:|',
    ]
    lines = list({(line['case'], line['cache']): line for line in read_lines('input')}.values())
    for line in lines:
        step, wait, volumes, memory = (
            format(line[key], form) if key in line else ''
            for key, form in (
                ('step_slices_per_second', '.2f'),
                ('data_wait', '.2%'),
                ('volume_slices_per_second', '.0f'),
                ('peak_memory_mb', '.0f'),
            )
        )
        rows.append(
            f'| {line["case"]} | {line["cache"]} | {line["slices_per_second"]:.0f} | {step} | '
            f'{wait} | {volumes} | {memory} |'
        )
    return '\n'.join(
        [*rows, '', _made_by('python -m experiments.benchmarks.input --source=FOLDER', lines)]
    )


def profile() -> str:
    """Where a training step spends its time."""
    lines = read_lines('profile')[-1:]
    rows = ['| stage | forward, ms | backward, ms |', '|---|---:|---:|']
    for line in lines:
        for stage, found in line['stages'].items():
            rows.append(f'| {stage} | {found["forward"]:.0f} | {found["backward"]:.0f} |')
        roof = line['roofline']
        rows += [
            '',
            f'Roofline: {roof["gflop"]:.0f} GFLOP at {roof["gflop_per_second"]:.0f} a second take '
            f'{roof["seconds_of_flops"]:.1f} s, {roof["gigabytes"]:.0f} GB at '
            f'{roof["gigabytes_per_second"]:.0f} a second {roof["seconds_of_bytes"]:.1f} s; XLA '
            'counts what each operation reads and writes, cache or not.',
        ]
    return '\n'.join([*rows, '', _made_by('python -m experiments.benchmarks.profile', lines)])


LINKS = {'NVLink, 450': 450, '400 Gbit/s, 50': 50, '25 Gbit/s, 3.1': 3.1}  # GB/s each way


def scale() -> str:
    """The bytes that a step moves between devices, the time by link, and the time of a save."""
    lines = read_lines('scale')
    rows = [
        '| network | parameters, MB | all-reduced a step, MB | '
        + ' | '.join(f'{name} GB/s, ms' for name in LINKS)
        + ' | checkpoint, MB | the loop waits, s | written, s | read and checked, s |',
        '|---|---:|---:|' + '---:|' * len(LINKS) + '---:|---:|---:|---:|',
    ]
    for line in {line['case']: line for line in lines}.values():
        (moved,) = line['moved_mb'].values()  # all-reduce, and nothing else
        name = line['case'].removeprefix('configs/')
        rows.append(
            f'| {name} | {line["parameters_mb"]:.0f} | {moved:.0f} | '
            + ' | '.join(f'{2 * moved / rate:.1f}' for rate in LINKS.values())
            + f' | {line["checkpoint_mb"]:.0f} | {line["save_returns_s"]:.1f} | '
            f'{line["save_written_s"]:.1f} | {line["restore_s"]:.1f} |'
        )
    return '\n'.join([*rows, '', _made_by('python -m experiments.benchmarks.scale', lines)])


def faults() -> str:
    """Each fault: how often it was tried, what was lost, and the command that repeats it."""
    rows = ['| fault | tried | lost | seconds | again by |', '|---|---:|---|---:|---|']
    today = {fault.fault: fault.command() for fault in FAULTS}  # a line may hold an old command
    for line in (chaos := read_lines('chaos')):
        command = line['command'].replace('experiments.chaos', 'tests.stress.chaos')
        phases = ', '.join(f'{name} {count}' for name, count in sorted(line['by_phase'].items()))
        read = f'; {line["loads"]} loads of a run that trains' if 'loads' in line else ''
        rows.append(
            f'| SIGKILL at a random moment ({phases}){read} | {line["kills"]} | {line["lost"]} | '
            f'{line["seconds"]:.0f} | `{command}` |'
        )
    for line in (tried := read_lines('reliability')):
        rows.append(
            f'| {line["fault"]} | {line["tries"]} | {line["lost"]} | {line["seconds"]:.0f} | '
            f'`{today.get(line["fault"], line["command"])}` |'
        )
    return '\n'.join([*rows, '', _made_by('python -m tests.stress.faults', chaos + tried)])


def fuzz() -> str:
    """Mutated inputs of each reader, and their outcomes."""
    return _fuzz([line for line in read_lines('fuzz') if 'new' not in line])


def fuzz_guided() -> str:
    """The same for inputs chosen by atheris."""
    return _fuzz([line for line in read_lines('fuzz') if 'new' in line], guided=True)


def _fuzz(lines: list[dict[str, Any]], *, guided: bool = False) -> str:
    newest = {line['reader']: line for line in lines}
    columns = {'inputs': 'inputs', 'refused': 'refused', 'read': 'accepted'}
    columns |= {'to new code': 'new'} if guided else {}
    columns |= {name: name.replace(' ', '_') for name in ('other errors', 'hangs', 'crashes')}
    columns |= {'stray files': 'stray_files', 'peak MB': 'peak_mb'}
    rows = [f'| reader | {" | ".join(columns)} |', f'|---|{"---:|" * len(columns)}']
    for reader, line in newest.items():
        rows.append(f'| {reader} | {" | ".join(f"{line[key]:,}" for key in columns.values())} |')
    seeds = ', '.join(sorted({str(line['seed']) for line in newest.values()}))
    command = f'python -m tests.stress.fuzz{" --guided" * guided} --inputs=10000 --seed={seeds}'
    return '\n'.join([*rows, '', _made_by(command, list(newest.values()))])


def soak() -> str:
    """Memory and open resources in the newest soak test."""
    lines = read_lines('soak')[-1:]
    rows = ['| | early | late |', '|---|---:|---:|']
    for line in lines:
        rows[0] = f'| of {line["steps"]:,} steps | a fifth on | at the end |'
        early, late = line['rss_mb']['20 %'], line['rss_mb']['90 %']
        rows.append(f'| resident memory, MB | {early} | {late} |')
        for name, key in (
            ('live arrays', 'live_arrays'),
            ('MB in them', 'live_mb'),
            ('threads', 'threads'),
            ('open files', 'fds'),
            ('child processes', 'children'),
        ):
            rows.append(f'| {name} | {line[key][0]} | {line[key][1]} |')
        rows += [
            '',
            f'{line["validations"]} validations and {line["checkpoints"]} checkpoints in '
            f'{line["seconds"]:.0f} s; two hours of configs/lgg.py:vgg_pspnet are '
            f'{line["lgg_two_hours"]} steps on this device. Memory by a line through all samples: '
            f'{line["kb_per_1000_steps"]:.0f} KB a thousand steps, '
            f'{line["kb_per_1000_steps"] * line["steps"] / line["checkpoints"] / 1e6:.2f} MB a '
            f'checkpoint; the bar: {line["criterion"]}. '
            f'Left behind in /dev/shm, the temporary folder or as processes: {line["left"]}.',
        ]
    return '\n'.join([*rows, '', _made_by('python -m tests.stress.soak', lines)])


def gpu() -> str:
    """Images per second on a GPU: each of our forms next to PyTorch's, and the checks before."""
    lines = read_lines('gpu_speed')
    checks = [line for line in lines if 'check' in line and 'logits' in line]
    timed = {line['case']: line for line in lines if 'case' in line}  # the newest of each
    peers = {
        name.removeprefix('torch ').split(', ')[0]: line
        for name, line in timed.items()
        if name.startswith('torch ')
    }
    rows = [
        '| case | form | ours, images/s | PyTorch, images/s | ratio | peak MB | compiled in, s |',
        '|---|---|---:|---:|---:|---:|---:|',
    ]
    for name, line in timed.items():
        if name.startswith('torch '):
            continue
        case, form = name.removeprefix('ours ').split(', ', 1)
        ours, peer = line['images_per_second'], peers.get(case)
        theirs = f'{peer["images_per_second"]:.0f}' if peer else ''
        ratio = f'{ours / peer["images_per_second"]:.2f}' if peer else ''
        memory, ready = (
            ', '.join(f'{x[key]:.0f}' for x in (line, peer) if x)
            for key in ('peak_memory_mb', 'compile_seconds')
        )
        rows.append(f'| {case} | {form} | {ours:.0f} | {theirs} | {ratio} | {memory} | {ready} |')
    if checks:
        rows += [
            '',
            f'{len(checks)} networks against the CPU in float32: logits differ by at most '
            f'{max(line["logits"] for line in checks):.0e}, the update of one training step by '
            f'{max(line["update"] for line in checks):.0e} of the largest value; '
            f'{sum(line["bfloat16_finite"] for line in checks)} are finite in bfloat16. PyTorch '
            'is `torch.compile`, channels_last.',
        ]
    return '\n'.join([*rows, '', _made_by('bash experiments/benchmarks/gpu_speed.sh', lines)])


def _short(line: dict[str, Any]) -> str:
    """The first seven digits of a line's commit, and '+changes' if it has that."""
    digits, plus, changes = line['commit'].partition('+')
    return digits[:7] + plus + changes


def _made_by(command: str, lines: list[dict[str, Any]]) -> str:
    commits = sorted({_short(line) for line in lines})
    devices = sorted({line['device'] for line in lines})
    versions = {f'{name} {v}' for line in lines for name, v in line.get('versions', {}).items()}
    facts = [f'`{command}`', f'commit {", ".join(commits)}', '; '.join(devices), *sorted(versions)]
    return f'{", ".join(facts)}.'


def knobs() -> str:
    """Every key of the config with its default and its comment in base.py, by section."""
    told, config = base.comments(), base.get_config()
    rows, section = [], None
    for key, value in flatten(config.to_dict()).items():
        here, _, knob = key.rpartition('.')
        if here != section:
            section = here
            rows += ['', f'## {here or "the run"}', '', '| knob | default | |', '|---|---|---|']
        words = told[key].replace('|', '\\|')
        rows.append(f'| `{knob}` | `{value!r}` | {words} |')
    return '\n'.join(rows[1:])


# Patients for whom FLAIR stands in for missing sequences: both, or the one after contrast. All
# others have three different channels (tests/test_lgg.py compares the images).
FLAIR_ALONE = ('DU_7013', 'FG_A60K', 'HT_7877', 'HT_8105', 'HT_A61B')
ONE_MISSING = ('DU_6407', 'DU_7301', 'DU_8165')


def gpu_lgg() -> str:
    """Dice of the runs of gpu_lgg.sh: as they are, and with what validation patients chose."""
    plain, chosen = (
        {line['experiment']: line for line in read_lines(name)}
        for name in ('gpu_lgg', 'gpu_lgg_chosen')
    )
    rows = ['| tested | patients | Dice mean | median | chosen: mean | 95 % interval | median |',
            '|---|---:|---:|---:|---:|---:|---:|']  # fmt: skip
    for what, prefix, chosen_by in (
        ('public hold-out', 'holdout_0', lambda name: True),
        ('5 folds by patient', 'fold_', lambda name: True),
        ('of these: all sequences', 'fold_', lambda name: name not in FLAIR_ALONE + ONE_MISSING),
        ('FLAIR and one more', 'fold_', lambda name: name in ONE_MISSING),
        ('FLAIR alone', 'fold_', lambda name: name in FLAIR_ALONE),
    ):
        dice, better = (
            np.array([
                patient['dice']
                for name, line in lines.items() if name.startswith(prefix)
                for patient in line['patients'] if chosen_by(splits.short_name(patient['patient']))
            ])
            for lines in (plain, chosen)
        )  # fmt: skip
        low, high = metrics.bootstrap_ci(better)
        rows.append(
            f'| {what} | {len(dice)} | {dice.mean():.3f} | {np.median(dice):.3f} | '
            f'{better.mean():.3f} | {low:.3f} to {high:.3f} | {np.median(better):.3f} |'
        )
    choose = 'python -m experiments.score --workdir=RUN --choose_postprocessing --split=test ...'
    made = _made_by('bash experiments/gpu_lgg.sh', [*plain.values()])
    return '\n'.join([*rows, '', f'{made} Chosen: {_made_by(choose, [*chosen.values()])}'])


def ablation() -> str:
    """A table per study, one row per variant: means over patients and seeds.

    A difference is the mean over patients of a seed's run less the base's run of that seed.
    """
    runs = {(line['study'], line['variant'], line['seed']): line for line in read_lines('ablation')}
    tables = []
    for name, study in STUDIES.items():
        home = BASE if study.page == 'pspnet' and BASE in study.variants else name
        rows = []
        for variant in study.variants:
            place = home if variant == BASE else name
            found = {seed: runs[place, variant, seed] for seed in study.seeds
                     if (place, variant, seed) in runs}  # fmt: skip
            if not found:
                continue
            dice, surface = (
                {seed: _by_patient(line, figure) for seed, line in found.items()}
                for figure in ('dice', 'surface_dice')
            )
            less = [
                np.mean([dice[seed][patient] - plain[patient] for patient in plain])
                for seed in dice
                if variant != BASE and (home, BASE, seed) in runs
                for plain in [_by_patient(runs[home, BASE, seed], 'dice')]
            ]
            means = [
                np.mean([np.mean([*one.values()]) for one in each.values()])
                for each in (dice, surface)
            ]
            rows.append(
                f'| {variant} | {len(dice)} | {means[0]:.3f} | '
                f'{f"{np.mean(less):+.3f}" if less else ""} | '
                f'{", ".join(f"{x:+.3f}" for x in less)} | {means[1]:.3f} |'
            )
        if any(not row.startswith(f'| {BASE} ') for row in rows):
            tables.append('\n'.join([
                f'**{study.question}** (`{name}`)', '',
                '| variant | seeds | Dice | less the base | by seed | surface Dice |',
                '|---|---:|---:|---:|---|---:|', *rows,
            ]))  # fmt: skip
    command = 'python -m experiments.ablation --study=all ...'
    return '\n\n'.join([*tables, _made_by(command, [*runs.values()])])


def _by_patient(line: dict[str, Any], figure: str) -> dict[str, float]:
    return {patient['patient']: patient[figure] for patient in line['patients']}


def zoo(name: str) -> str:
    """Every patient of the newest evaluation of a network of the zoo, and their mean and median."""
    line = [line for line in read_lines('zoo') if line['experiment'] == f'zoo:{name}'][-1]
    keys = {'dice': 3, 'sensitivity': 3, 'precision': 3, 'hd95': 1}
    rows = ['| patient | Dice | sensitivity | precision | HD95, voxels | lesion, voxels |',
            '|---|---:|---:|---:|---:|---:|']  # fmt: skip
    for patient in line['patients']:
        cells = [f'{patient[key]:.{digits}f}' for key, digits in keys.items()]
        voxels = f'{patient["lesion_voxels"]:,}'
        rows.append(f'| {patient["patient"]} | {" | ".join(cells)} | {voxels} |')
    for what in ('mean', 'median'):
        cells = [f'{line["summary"][key][what]:.{digits}f}' for key, digits in keys.items()]
        rows.append(f'| **{what}** | {" | ".join(cells)} | |')
    low, high = line['summary']['dice']['ci95']
    command = (
        f'python -m experiments.score --workdir=zoo:{name} --split={line["data"]["split"]} ...'
    )
    return '\n'.join([
        *rows, '', f'95 % interval of the mean Dice: {low:.3f} to {high:.3f}. '
        f'Trained as {line["trained"]}, evaluated by {_made_by(command, [line])}'
    ])  # fmt: skip


TABLES = {
    'experiments/zoo/lgg/README.md': {'zoo': functools.partial(zoo, 'lgg')},
    'docs/results.md': {'lgg': lgg, 'gpu_lgg': gpu_lgg, 'ablation': ablation},
    'docs/models.md': {'architectures': architectures},
    'docs/speed.md': {'speed': speed},
    'docs/configs.md': {'knobs': knobs},
    'tests/stress/README.md': {
        'faults': faults,
        'fuzz': fuzz,
        'fuzz_guided': fuzz_guided,
        'soak': soak,
    },
    'docs/scale.md': {'scale': scale},
    'experiments/README.md': {
        'forms': forms,
        'profile': profile,
        'gpu': gpu,
        'input': input_rates,
    },
}


def fill(page: str, text: str) -> str:
    """The page's `text` with every marked table made again."""
    for name, make in TABLES[page].items():
        before, after = f'<!-- table: {name} -->\n', '<!-- end -->'
        table = f'{before}{make()}\n{after}'
        text, found = re.subn(f'{before}.*?{after}', lambda _, t=table: t, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f'{page} has {found} places for the table {name}, not 1')
    return text


if __name__ == '__main__':
    for page in TABLES:
        path = ROOT / page
        path.write_text(fill(page, path.read_text()))
