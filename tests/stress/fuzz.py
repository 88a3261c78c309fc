"""Do readers refuse files that are broken or hostile, with one line and without harm?

  python -m tests.stress.fuzz [--reader=NAME,...] --inputs=10000 --seed=0
  python -m tests.stress.fuzz --reader=NAME --first=NUMBER --inputs=1 --seed=0    one input again
  python -m tests.stress.fuzz --guided    atheris looks where code was reached that was not before

Each input is a valid file (or folder, one of whose files) changed at random. A reader may return
or raise PspnetError with printable lines; all else is a failure: other errors, MemoryError, a
crash, silence for --limit seconds, files left anywhere. What failed is kept below --keep.

To add a reader, put name: (seeds, read) into READERS. `seeds(folder)` writes small valid files or
folders below an empty folder and returns their paths; each must be read without an error.
`read(path)` reads one as a command would, and may write below `path.parent / 'out'` only. Both run
in a worker process, so imports that take long belong inside them. An input depends on nothing but
the seed, the reader's name, the input's number and the seeds' bytes; with --guided also on all
inputs before it.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from absl import app, flags

from pspnet_jax.runtime.errors import PspnetError
from tests.stress import fuzz_data, fuzz_state, mutate

READERS = {**fuzz_data.READERS, **fuzz_state.READERS}


FAILURES = ('other_errors', 'hangs', 'crashes', 'stray_files')
KINDS = ('accepted', 'refused', *FAILURES)


def attempt(read, path: Path) -> tuple[str, str]:
    """(kind, what was wrong) of one input."""
    try:
        read(path)
    except PspnetError as error:
        return ('other_errors', wrong) if (wrong := fault_of(error)) else ('refused', '')
    except Exception:
        return 'other_errors', traceback.format_exc()
    return 'accepted', ''


def fault_of(error: PspnetError) -> str:
    """What a message must not be: of more lines than faults, empty, unprintable, long."""
    lines = str(error).split('\n')
    if len(lines) != 1 + len(error.faults):
        return f'not one line, nor a list: {str(error)!r}'
    if not all(line and line.isprintable() for line in lines):
        return f'not printable: {str(error)!r}'
    if max(map(len, lines)) > 10_000:
        return f'a line is too long: {str(error)[:1000]!r}'
    return ''


def left_behind(root: Path) -> list[str]:
    """Files where none should be; they are removed."""
    found = [path for name in ('cwd', 'tmp') for path in (root / name).iterdir()]
    found += [path for path in root.iterdir() if path.name not in FOLDERS]
    found += [path for path in (root / 'deep' / 'case').iterdir() if path.name == mutate.STRAY.name]
    found += [mutate.STRAY] if os.path.lexists(mutate.STRAY) else []
    for path in found:
        remove(path)
    return list(map(str, found))


FOLDERS = ('cwd', 'tmp', 'seeds', 'deep')  # of a worker; deep/case holds the input


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def work(
    pipe, name: str, seed: int, first: int, last: int, root: Path, keep: Path, memory: int,
    corpus: Path | None,
):  # fmt: skip
    """Send (number, '', 0), and when it is done (number, kind, peak MB), of each input."""
    seeds, read = READERS[name]
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
    os.chdir(root / 'cwd')
    os.environ['TMPDIR'] = tempfile.tempdir = str(root / 'tmp')
    quiet = os.open(os.devnull, os.O_RDWR)
    case = root / 'deep' / 'case'
    if corpus:
        from tests.stress import fuzz_guided
    with fuzz_guided.traced() if corpus else contextlib.nullcontext():
        valid = mutate.load(seeds(root / 'seeds'))
        for one in valid:
            read(mutate.write(one, fresh(case)))
    left_behind(root)  # what imports leave is not an input's
    for n in (0, 1, 2):  # libtiff and FFmpeg say on stderr what they find
        os.dup2(quiet, n)
    # A length of 32 bits may be reserved, which costs nothing until it is written to.
    held = int(Path('/proc/self/status').read_text().partition('VmData:')[2].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + memory * 2**20 + 2**33,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    start = peak = peak_mb()
    number = first

    def try_one(changed: mutate.Seed) -> None:
        nonlocal number, peak
        path = mutate.write(changed, fresh(case))
        pipe.send((number, '', 0))
        kind, wrong = attempt(read, path)
        before, peak = peak, peak_mb()
        if peak > max(before, start + memory):
            kind, wrong = 'other_errors', f'{peak - start} MB were taken {wrong}'
        if stray := left_behind(root):
            kind, wrong = 'stray_files', f'{stray} {wrong}'
        if kind in FAILURES:
            save(case, keep / f'{name}_{seed}_{number}', wrong)
        pipe.send((number, kind, peak))
        number += 1
        if number == last:
            pipe.send((last, 'done', 0))
            os._exit(0)  # libFuzzer would go on

    if corpus:
        fuzz_guided.fuzz(valid, corpus=corpus, seed=seed + first, read=try_one)
    while True:
        try_one(mutate.change(valid, random.Random(f'{seed} {name} {number}')))


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def save(case: Path, place: Path, why: str) -> None:
    """Keep an input, FIFOs left out, and the reason."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for path in case.rglob('*'):
        if path.is_file() and not path.is_symlink() and 'out' not in path.parts:
            target = place / path.relative_to(case)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (place / 'why.txt').write_text(why, errors='backslashreplace')


def run(
    name: str, *, seed: int, inputs: int, first: int, limit: float, memory: int, keep: Path,
    guided: bool = False,
):  # fmt: skip
    """{kind: inputs}, and 'new': what reached new code, where `guided`; peak MB of one reader."""
    with tempfile.TemporaryDirectory(prefix='pspnet_jax_corpus_') as corpus:
        corpus = Path(corpus) if guided else None
        counts, peak = _run(name, seed, inputs, first, limit, memory, keep, corpus)
        if corpus:
            counts['new'] = sum(not path.name.startswith('seed_') for path in corpus.iterdir())
    return counts, peak


def _run(name, seed, inputs, first, limit, memory, keep, corpus):
    processes = multiprocessing.get_context('spawn')
    counts, next_one, last, peak = dict.fromkeys(KINDS, 0), first, first + inputs, 0
    while next_one < last:
        with tempfile.TemporaryDirectory(prefix='pspnet_jax_fuzz_') as temporary:
            root, (ours, theirs) = Path(temporary), processes.Pipe(duplex=False)
            arguments = (theirs, name, seed, next_one, last, root, keep.resolve(), memory, corpus)
            worker = processes.Process(target=work, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            kind, begun, started = '', False, False
            while kind != 'done':
                try:  # imports and seeds may take longer than an input
                    if not ours.poll(limit if started else 300):
                        kind = 'hangs'
                        break
                    next_one, kind, megabytes = ours.recv()
                except EOFError:
                    kind = 'crashes'
                    break
                started, begun, peak = True, not kind, max(peak, megabytes)
                if kind in counts:
                    counts[kind] += 1
                    next_one += 1
            worker.kill()
            worker.join()
            if kind != 'done':
                if not begun:
                    raise RuntimeError(f'{name}: the worker ends before its first input')
                counts[kind] += 1
                why = f'{kind}, exit code {worker.exitcode}'
                save(root / 'deep' / 'case', keep / f'{name}_{seed}_{next_one}', why)
                next_one += 1
    return counts, peak


def main(_) -> None:
    options = flags.FLAGS
    if wrong := set(options.reader) - READERS.keys():
        raise app.UsageError(f'--reader={",".join(wrong)} is none of {", ".join(READERS)}')
    if options.guided and not importlib.util.find_spec('atheris'):
        raise app.UsageError('--guided needs atheris, which is not installed here')
    keep, failed = Path(options.keep).resolve(), 0
    for name in options.reader or READERS:
        start = time.perf_counter()
        counts, peak = run(
            name, seed=options.seed, inputs=options.inputs, first=options.first,
            limit=options.limit, memory=options.memory, keep=keep, guided=options.guided,
        )  # fmt: skip
        seconds = round(time.perf_counter() - start, 1)
        line = {'reader': name, 'inputs': options.inputs, **counts, 'peak_mb': peak}
        line |= {'seconds': seconds, 'seed': options.seed, **made_by()}
        with open(options.results, 'a') as file:
            file.write(json.dumps(line) + '\n')
        print(json.dumps(line), flush=True)
        failed += sum(counts[kind] for kind in FAILURES)
    if failed:
        sys.exit(f'{failed} failures: see {keep}')


def made_by() -> dict[str, Any]:
    from experiments.provenance import commit, device

    command = ' '.join(['python -m tests.stress.fuzz', *sys.argv[1:]])
    return {'commit': commit(), 'command': command, 'device': device()}


def define_flags() -> None:
    flags.DEFINE_bool('guided', False, 'libFuzzer chooses: changes of what reached new code')
    flags.DEFINE_list('reader', '', f'some of {", ".join(READERS)}; empty: all')
    flags.DEFINE_integer('inputs', 10_000, 'of each reader')
    flags.DEFINE_integer('first', 0, "the first input's number")
    flags.DEFINE_integer('seed', 0, 'of the changes')
    flags.DEFINE_float('limit', 20.0, 'seconds of silence after which a worker is killed')
    flags.DEFINE_integer('memory', 1024, 'MB that one input may take')
    flags.DEFINE_string('keep', 'runs/fuzz', 'folder for the inputs that failed')
    flags.DEFINE_string('results', 'experiments/results/fuzz.jsonl', 'file to add lines to')


if __name__ == '__main__':
    define_flags()
    app.run(main)
