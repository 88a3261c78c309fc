"""Ablation studies: one change at a time, with the same protocol and patients and several seeds.

  python -m experiments.ablation --list
  python -m experiments.ablation --study=bins --source=FOLDER --workdir=runs/ablation

Each variant and seed is a run of `experiments.run` in WORKDIR/STUDY/VARIANT_SEED. Its line, with
the names of study and variant, is added to --results; a finished run is not repeated, and a stopped
one is resumed. --study takes several names, or 'all'. The studies of PSPNet share one base, which
runs only once.

All metrics are for one quarter of the 78 patients outside the public hold-out (the test part of
fold 0 of 4; 'sequences' has all four folds), by a network that never saw them: choices made here do
not depend on the hold-out.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from experiments import run
from pspnet_jax import cli, models
from pspnet_jax.config import augmentations, lgg
from pspnet_jax.runtime.errors import ConfigError

RESULTS = Path(__file__).parent / 'results' / 'ablation.jsonl'

# Slices at half resolution; a run takes minutes on one core.
QUICK = {
    'data.split': 'kfold',
    'data.folds': 4,
    'data.fold': 0,
    'data.size': (128, 128),
    'train.batch_size': 8,
    'train.steps': 500,
    'train.validate_every': 125,
    'train.ema_decay': 0.99,
    'optim.learning_rate': 3e-4,
    'optim.new_layer_factor': 3.0,
    'eval.batch_size': 8,
    'eval.bootstrap': 1000,
}
BASE = 'base'
OWN_ENCODER = ('unet_mini', 'vgg_pspnet_blog')
ON_MOBILENET = QUICK | {'model.backbone': 'mobilenet_v2'}
PSPNET = ON_MOBILENET | {'model.output_stride': 8}
# The same steps and pixels per step at full resolution, so each crop shows a quarter of the brain.
FINE = {'data.size': (256, 256), 'augment.crop': 128}


class Study(NamedTuple):
    """`variants` are {name: its changes}; 'base', where there is one, changes nothing.

    The key 'page' replaces the study's argument of configs/lgg.py.
    """

    question: str
    page: str
    changes: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...] = (0, 1)


def pspnet(question: str, **variants: Mapping[str, Any]) -> Study:
    return Study(question, 'pspnet', PSPNET, {BASE: {}, **variants})


def one_knob(key: str, *values: Any) -> dict[str, dict[str, Any]]:
    return {f'{key.split(".")[-1]} {value}': {key: value} for value in values}


def recipe(name: str) -> dict[str, float]:
    return {f'augment.{key}': value for key, value in augmentations.RECIPES[name].items()}


STUDIES = {
    'bins': pspnet(
        'How much is the pyramid worth, and which levels?',
        **{
            'no pyramid': {'model.bins': ()},
            'global average': {'model.bins': (1,)},
            '1 2 4 8': {'model.bins': (1, 2, 4, 8)},
            '1 2 3 6 12': {'model.bins': (1, 2, 3, 6, 12)},
        },
    ),
    'aux': pspnet(
        'What does the auxiliary loss add?',
        none={'model.aux_head': False},
        **one_knob('loss.aux', 0.2, 0.9),
    ),
    'stride': pspnet(
        'How fine must the last map be?',
        **one_knob('model.output_stride', 4, 16, 32),
    ),
    'backbone': pspnet(
        'Which encoder?',
        **one_knob('model.backbone', 'efficientnet_lite0'),
        **{
            f'{name}, random weights': {'model.backbone': name, 'model.pretrained': ''}
            for name in ('mobilenet_v2', 'resnet18')
        },
    ),
    'loss': pspnet(
        'Which loss?',
        **{
            'cross-entropy': {'loss.dice': 0.0},
            'soft Dice': {'loss.cross_entropy': 0.0},
            **{
                f'{name} too': {f'loss.{name}': 1.0}
                for name in ('focal', 'tversky', 'lovasz', 'top_k')
            },
            'boundary too': {'loss.boundary': 0.01},
        },
    ),
    'sampling': pspnet(
        'Should slices with lesions be drawn more often?',
        **one_knob('data.sampling', 'uniform'),
        **one_knob('data.lesion_floor', 0.3),
    ),
    'normalize': pspnet(
        'Which normalisation?',
        **one_knob('data.normalize', 'weights', 'buda'),
    ),
    'context': pspnet('Do neighbouring slices help?', **one_knob('data.context', 1)),
    'augment': pspnet(
        'Which augmentation?',
        **{name: recipe(name) for name in ('none', 'flips', 'geometric', 'intensity', 'strong')},
        nnunet=recipe('nnunet'),
        **one_knob('augment.channel_dropout', 0.2),
    ),
    'average': pspnet('What does the average of the parameters add?',
                      **one_knob('train.ema_decay', 0.0)),
    'unet': Study(
        'What helps a U-Net on MobileNetV2?',
        'unet',
        ON_MOBILENET,
        {
            BASE: {},
            **one_knob('model.backbone', 'efficientnet_lite0'),
            **one_knob('data.context', 1),
            **one_knob('model.deep_supervision', True),
            **one_knob('data.normalize', 'weights', 'buda'),
            **{name: recipe(name) for name in ('strong', 'nnunet')},
            **{f'{name} too': {f'loss.{name}': 1.0} for name in ('tversky', 'lovasz', 'top_k')},
            **one_knob('train.ema_decay', 0.0),
            'random weights': {'model.pretrained': ''},
        },
    ),
    'outlines': pspnet(
        "What does PSPNet lack to follow outlines as a U-Net does?",
        **{
            'finer input': FINE,
            'finer input, output_stride 4': FINE | {'model.output_stride': 4},
            'a skip (deeplab_v3plus)': {'page': 'deeplab_v3plus'},
            'a skip, finer input': FINE | {'page': 'deeplab_v3plus'},
            'unet': {'page': 'unet', 'model.output_stride': None},
            'unet, finer input': FINE | {'page': 'unet', 'model.output_stride': None},
        },
    ),
    'sequences': Study(
        'Does channel dropout help patients who lack sequences? All four folds',
        'unet',
        ON_MOBILENET,
        {
            f'fold {fold}, channel_dropout {value}': {
                'data.fold': fold,
                'augment.channel_dropout': value,
            }
            for fold in range(4)
            for value in (0.0, 0.2)
        },
        seeds=(0,),
    ),
    'networks': Study(
        'Every network under one protocol: on MobileNetV2 if it takes another backbone',
        'pspnet',
        QUICK,
        {
            name: {'page': name, 'model.backbone': None if name in OWN_ENCODER else 'mobilenet_v2'}
            for name in models.MODELS
        }
        | {'unet, its own': {'page': 'unet', 'model.backbone': None}},
    ),
    'blog': Study(
        "The blog's setting and ours at its 5,000 views",
        'vgg_pspnet_blog',
        {key: value for key, value in QUICK.items() if key.startswith(('data', 'eval'))},
        {
            # 50 epochs of 50 steps, 384 x 384, Adam, cross-entropy alone, no augmentation.
            'vgg_pspnet_blog': {
                'data.size': (384, 384),
                'data.normalize': 'weights',
                'data.sampling': 'uniform',
                'train.batch_size': 2,
                'train.steps': 2500,
                'optim.name': 'adam',
                'optim.learning_rate': 1e-3,
                'optim.schedule': 'constant',
                'optim.weight_decay': 0.0,
                'optim.new_layer_factor': 1.0,
                'loss.dice': 0.0,
                **recipe('none'),
            },
            'pspnet': {'page': 'pspnet', **PSPNET, 'train.steps': 625},
            'unet': {'page': 'unet', **ON_MOBILENET, 'train.steps': 625},
        },
        seeds=(0,),
    ),
}  # fmt: skip


def config_of(study: Study, variant: str, seed: int, local: Mapping[str, Any]) -> ConfigDict:
    """The config of a run; `local` is where this machine keeps the data."""
    changes = dict(study.variants[variant])
    page = changes.pop('page', study.page)
    config = lgg.get_config(page)
    config.update_from_flattened_dict({**study.changes, **changes, **local, 'seed': seed})
    return config


def main() -> None:
    options = flags.FLAGS
    if options.list:
        for name, study in STUDIES.items():
            print(f'{name}: {study.question} {"; ".join(study.variants)}')
        return
    chosen = list(STUDIES) if options.study == ['all'] else options.study
    if unknown := [name for name in chosen if name not in STUDIES]:
        raise ConfigError(f'--study={",".join(unknown)} is not one of {", ".join(STUDIES)}')
    if not options.workdir:
        raise ConfigError('--workdir is missing: give a folder for the runs')
    local = {'data.source': options.source, 'data.root': options.root}
    for name in chosen:
        study = STUDIES[name]
        for seed in study.seeds:
            for variant in study.variants:
                run_one(name, variant, seed, {key: path for key, path in local.items() if path})


def run_one(name: str, variant: str, seed: int, local: Mapping[str, Any]) -> None:
    """Train and test one variant, unless its line exists."""
    options, study = flags.FLAGS, STUDIES[name]
    if study.page == 'pspnet' and variant == BASE:
        name = BASE
    there = {(line['study'], line['variant'], line['seed']) for line in read(options.results)}
    if (name, variant, seed) in there:
        return
    print(f'{name}: {variant}, seed {seed}', flush=True)
    config = config_of(study, variant, seed, local)
    place = f'{variant.replace(" ", "_").replace(",", "")}_{seed}'
    page = study.variants[variant].get('page', study.page)
    changes = {**study.changes, **study.variants[variant]}
    texts = {key: str(value) for key, value in changes.items() if key != 'page'}
    workdir = Path(options.workdir) / name / place
    line = run.make_line(config, workdir, f'configs/lgg.py:{page}', texts)
    with open(options.results, 'a') as file:
        file.write(json.dumps({'study': name, 'variant': variant, **line}) + '\n')


def read(path: str | Path) -> list[dict[str, Any]]:
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == '__main__':
    flags.DEFINE_list('study', [], "names of --list; 'all'")
    flags.DEFINE_bool('list', False, 'print the studies and their variants')
    flags.DEFINE_string('workdir', '', 'a folder for each run')
    flags.DEFINE_string('source', '', 'the folder with kaggle_3m; default: download it')
    flags.DEFINE_string('root', '', "folder of the built data set; default: tfds' own folder")
    flags.DEFINE_string('results', str(RESULTS), 'the .jsonl that gets the lines')
    cli.run(main)
