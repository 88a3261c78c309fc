"""Measures whether the loader keeps up with the step, and its speed and memory as data grow.

  python -m experiments.benchmarks.input --source=FOLDER [--root=BUILT]   FOLDER holds kaggle_3m

Loader: batches of a config per second, compared with its step on this machine. Growth: the rate of
the loader and of evaluation's volumes, and the memory of the process, with 100 to 10,000 PNG slices
of 256x256, kept in memory or not. Lines are added to experiments/results/input.jsonl.
"""

import io
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from pspnet_jax.training import placement, update

SOURCE = flags.DEFINE_string('source', '', 'folder of the LGG data; default: leave it out')
ROOT = flags.DEFINE_string('root', '', 'folder of the built data set')
RESULTS = Path('experiments/results/input.jsonl')
SIZES = (100, 1_000, 10_000)


def loader(config_name: str, cache: str, source: str, root: str) -> dict[str, Any]:
    """Slices per second of the loader alone, of the step that it feeds, and the share of waiting.

    The loader is measured in its second pass over 20 batches, the step with augmentation; the share
    is that of the step's time spent waiting for slices.
    """
    import importlib

    import jax

    from pspnet_jax import models
    from pspnet_jax.data import pipeline, sources, volumes
    from pspnet_jax.training import optim

    module, _, argument = config_name.partition(':')
    config = importlib.import_module(f'pspnet_jax.config.{module}').get_config(argument)
    config.data.source, config.data.root = source, root
    slices, parts = sources.load(config)
    if cache == 'memory':
        slices = volumes.in_memory(slices)
    part, batch_size = volumes.select(slices, parts['train']), config.train.batch_size
    drawn = pipeline.draws(
        part, seed=0, sampling=config.data.sampling, lesion_floor=config.data.lesion_floor
    )

    def read_ahead():
        options = {'intensity': None, 'threads': config.data.threads, 'first_step': 0}
        return pipeline.batches(part, drawn, batch_size=batch_size, **options)

    def rate(count: int) -> float:
        batches = read_ahead()
        next(batches)
        start = time.perf_counter()
        for _ in range(count):
            batch = next(batches)
        return count * batch_size / (time.perf_counter() - start), batch

    rate(20)
    loader_rate, batch = rate(20)
    model = models.create(**config.model)
    tx, _ = optim.create(config.optim, steps=10)
    state = update.create_state(model, tx, seed=0, channels=slices.channels, ema=False)
    placed = placement.over_mesh(update.bind_step(config, model, tx))
    state = placed.put_state(state)
    run, _ = placed.compile(state, placed.put_batch(batch))
    batches, waited = read_ahead(), 0.0
    for n in range(4):
        if n == 1:  # from here on, as in the training loop
            start, waited = time.perf_counter(), 0.0
        before = time.perf_counter()
        batch = placed.put_batch(next(batches))
        waited += time.perf_counter() - before
        state, metrics = run(state, batch)
        jax.block_until_ready(metrics)
    seconds = time.perf_counter() - start
    return {
        'slices_per_second': loader_rate,
        'step_slices_per_second': 3 * batch_size / seconds,
        'data_wait': waited / seconds,
    }


def growth(count: int, cache: str) -> dict[str, Any]:
    """Slices per second of the loader and of whole volumes, and peak memory, for `count` slices."""
    from PIL import Image

    from pspnet_jax.data import phantom, pipeline, volumes

    a_volume = phantom.load(volumes=4, slices=20, size=256, seed=0)
    pairs = [a_volume.read(int(key)) for key in a_volume.key]

    def png(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, 'png', compress_level=1)
        return buffer.getvalue()

    coded = [tuple(map(png, pair)) for pair in pairs]

    def read(key: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = coded[key % len(coded)]
        return tuple(np.asarray(Image.open(io.BytesIO(data))) for data in (image, mask))

    patient = np.array([f'p{n // 20:05d}' for n in range(count)])
    slices = volumes.Slices(
        read=read,
        key=np.arange(count),
        patient=patient,
        slice=np.arange(count) % 20,
        lesion_pixels=np.array([volumes.lesion_pixels(pairs[n % 80][1]) for n in range(count)]),
        intensity=dict.fromkeys(sorted(set(patient)), next(iter(a_volume.intensity.values()))),
    )
    if cache == 'memory':
        slices = volumes.in_memory(slices)
    drawn = pipeline.draws(slices, seed=0, sampling='lesion', lesion_floor=0.1)
    batches = pipeline.batches(
        slices, drawn, batch_size=16, first_step=0, intensity=None, threads=4
    )
    next(batches)
    start = time.perf_counter()
    for _ in range(100):
        next(batches)
    loader_rate = 1600 / (time.perf_counter() - start)
    start, seen = time.perf_counter(), 0
    for volume in itertools.islice(volumes.iterate_volumes(slices), 50):
        seen += len(volume.image)
    return {
        'slices_per_second': loader_rate,
        'volume_slices_per_second': seen / (time.perf_counter() - start),
        'peak_memory_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main(_) -> None:
    import jax

    from experiments.provenance import commit, device

    jobs = [('loader', 'phantom', 'memory', '', '')]
    if SOURCE.value:
        jobs += [
            ('loader', name, cache, SOURCE.value, ROOT.value)
            for name in ('lgg:pspnet_resnet50', 'lgg:vgg_pspnet', 'lgg:unet_mini')
            for cache in ('none', 'memory')
        ]
    jobs += [('growth', count, cache) for cache in ('none', 'memory') for count in SIZES]
    for job in jobs:
        done = subprocess.run(
            [sys.executable, '-m', 'experiments.benchmarks.input', '--measure', json.dumps(job)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        line = {
            'what': job[0],
            'case': f'{job[1]} slices' if job[0] == 'growth' else f'configs/{job[1]}',
            'cache': job[2],
            **found,
            'device': device(),
            'versions': {'jax': jax.__version__},
            'commit': commit(),
        }
        print({key: line[key] for key in ('what', 'case', 'cache', *found)}, flush=True)
        with open(RESULTS, 'a') as file:
            file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--measure']:
        kind, *arguments = json.loads(sys.argv[2])
        print(json.dumps({'loader': loader, 'growth': growth}[kind](*arguments)))
    else:
        app.run(main)
