"""Evaluates a checkpoint on a split or data set and writes the results."""

import contextlib
import functools
import itertools
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from PIL import Image

from pspnet_jax.config import to_dict, with_prediction
from pspnet_jax.data import pairing, sources, splits, volumes
from pspnet_jax.data.volumes import Volume
from pspnet_jax.evaluation import fitting, report, visualize
from pspnet_jax.evaluation.fitting import choose_postprocessing, fit_temperature
from pspnet_jax.evaluation.scores import (
    PredictFn,
    evaluate_options,
    evaluate_volumes,
    predict_foreground,
    table,
    with_ignored,
)
from pspnet_jax.evaluation.words import Words, words_for
from pspnet_jax.inference import calibration, choice, infer
from pspnet_jax.inference.runs import Run, open_runs, together
from pspnet_jax.inference.settings import (
    choice_views,
    label_options,
    program_options,
    views,
    with_choice,
)
from pspnet_jax.runtime import hosts, paths, text
from pspnet_jax.runtime.errors import ConfigError, DataError, say, some
from pspnet_jax.runtime.storage import write_json, writing

logger = logging.getLogger(__name__)

Loaded = tuple[volumes.Slices, dict[str, list[str]]]  # `sources.load`'s
SPLITS = ('train', 'validation', 'test')
ABOUT = 'source.json'  # in a folder of results: what was evaluated


def evaluate_checkpoint(
    workdir: str | Path | Sequence[str | Path],
    *,
    split: str = '',
    data: str = '',
    which: str = '',
    fit: Collection[str] = (),
    changes: Mapping[str, Any] = MappingProxyType({}),
    group: str | None = None,
    trusted: bool = False,
    loaded: Loaded | None = None,
    out: str | Path = '',
) -> dict[str, Any]:
    """Evaluate; write evaluation.json, report.html and pictures to a folder; print the table.

    `data` is a folder with images/ and masks/, as the config reads them, or in the Kaggle layout.
    Without it the data of the training are read, if this user trained on them on this machine or
    says that the run is `trusted`: a run from elsewhere may name any folder. `split` is a part of
    WORKDIR/splits.json; '' takes all of `data`, or 'test', or where that is empty 'validation'.
    `group` replaces the run's `data.group`; `changes` are those of `with_prediction`. The folder is
    `out` or that of `_results_folder`. Several workdirs, split by the first, are an ensemble, which
    needs `out`. `loaded` is what `sources.load` gave, where the caller has it.

    `fit` lists what is fitted on the validation patients first, kept with the run, and applied to
    that checkpoint by this and later calls: 'postprocessing' (`with_choice`, postprocessing.json)
    and 'temperature' (temperature.json, for the same `views`). Returns what evaluation.json holds.
    """
    workdirs = [workdir] if isinstance(workdir, str | Path) else list(workdir)
    _check(fit, workdirs, out, split, data)
    workdirs, data = [*map(paths.local, workdirs)], data and os.path.abspath(paths.local(data))
    workdir, runs = workdirs[0], open_runs(workdirs, which)
    run, alone = together(runs), len(runs) == 1
    config, step = with_prediction(run.config, changes), run.step
    split = split or ('' if data else _own_part(workdir))
    if not (data or trusted):
        _check_known(config, split)
    names, open_volumes, own = _volume_source(config, workdir, split, data, run, group, loaded)
    about = {'source': data or config.data.name, 'split': split}
    folder = _results_folder(workdir, out, about | {'digest': run.digest}, bool(data))
    digests, program = [], _programs(run, config)
    options = evaluate_options(config, run.intensity)
    if 'postprocessing' in fit:
        tried = fitting.grid(config.predict, config.model.num_classes, given=changes)
        part = open_volumes(hosts.share(names))
        facts = choose_postprocessing(program, part, tried=tried, order=names, **options)
        _keep(choice.save, workdir, step, choice_views(config), split, facts)
        print(f'post-processing for step {step}: {choice.describe(facts)}')
    config, chosen = with_choice(run.config, workdir, step, changes) if alone else (config, None)
    predict_fn = program(config.predict.flip)
    if 'temperature' in fit:
        facts = fit_temperature(predict_fn, open_volumes(), **options)
        _keep(calibration.save, workdir, step, views(config), split, facts)
        print(calibration.describe(facts, step))
    temperature = calibration.load(workdir, step, views(config)) if alone else 1.0
    labels = label_options(config)
    result = evaluate_volumes(
        predict_fn,
        open_volumes(hosts.share(names)),
        **options,
        temperature=temperature,
        label_options=labels,
        each=functools.partial(_save_picture, folder, digests, config.model.class_names),
        order=names,
    )
    result['data'] |= about
    result |= {'postprocessing': chosen, 'checkpoint': _about(runs, workdirs, config)}
    if data or not alone:
        result['data'] |= tell_overlap(workdirs, dict(hosts.gather(digests)), words_for(result))
    mark_seen(result)
    if hosts.is_first():
        given = labels | {'batching': options['batching'], 'temperature': temperature}
        predict = functools.partial(predict_foreground, predict_fn, **given)
        given = {'split': split or None, 'data': data or None, 'checkpoint': which or None}
        command = _command(workdirs, given | {'group': group, 'out': out or None} | changes)
        curves = workdir if alone else folder  # which has none
        _write(curves, folder, result, predict, open_volumes, config.loss.ignore_label, command)
        if own and not out:
            _copy_to(workdir, folder)
    return result


def _results_folder(
    workdir: Path, out: str | Path, about: Mapping[str, str], is_other: bool
) -> Path:
    """Return the results folder, the same on all hosts, with the file ABOUT in it.

    It is `out`, WORKDIR/evaluation/SPLIT, or WORKDIR/evaluation/NAME of the data's folder. What it
    holds is never replaced by the evaluation of other data. Raises ConfigError if `out` holds
    another evaluation.
    """
    if not hosts.is_first():
        return Path(*hosts.gather([]))
    folder, base = paths.local(out) if out else None, workdir / 'evaluation'
    if folder and not _is_free(folder, about):
        raise ConfigError(
            f'{folder} holds an evaluation of other data or another checkpoint: give another '
            '--out, or remove the folder'
        )
    if not folder and not is_other:
        folder = base / about['split']
    if not folder:
        same = {key: about[key] for key in ('source', 'split')}
        name = '-'.join(filter(None, (Path(about['source']).name or 'data', about['split'])))
        names = itertools.chain([name], (f'{name}-{n}' for n in itertools.count(2)))
        folder = next(
            base / name for name in names if name not in SPLITS and _is_free(base / name, same)
        )
    write_json(folder / ABOUT, about)
    return Path(*hosts.gather([str(folder)]))


def _is_free(folder: Path, about: Mapping[str, str]) -> bool:
    """Whether a folder holds no evaluation, or one of the same data."""
    if not (folder / ABOUT).exists():
        return not (folder / 'evaluation.json').exists()
    try:
        kept = text.read_json(folder / ABOUT, most=text.NOTE)
    except DataError:
        return False
    return isinstance(kept, dict) and all(kept.get(key) == about[key] for key in about)


def mark_seen(result: dict[str, Any]) -> None:
    """Set 'seen' of each case that the run was trained or validated on to the name of that part."""
    data = result['data']
    overlap = data.get('overlap') or {}
    for row in result['patients']:
        parts = [
            part for part in ('train', 'validation') if row['patient'] in overlap.get(part, ())
        ]
        if not overlap and data.get('split') in ('train', 'validation'):
            parts = [data['split']]
        if parts:
            row['seen'] = parts[0]


def _check(
    fit: Collection[str], workdirs: Sequence[str | Path], out: str | Path, split: str, data: str
) -> None:
    """Raise ConfigError if `fit` is unknown, or would not be fitted on the validation patients, and
    if something would be written to a network of the package, or an ensemble would be fitted or has
    no folder.
    """
    if not workdirs:
        raise ConfigError('workdir is empty: give the folder of a run')
    if workdirs[1:] and (fit or not out):
        raise ConfigError(
            f'--workdir names {len(workdirs)} runs, which are evaluated as an ensemble: '
            + ('fit one run at a time' if fit else 'give --out=FOLDER for the results')
        )
    if fit or not out:
        paths.writable(workdirs[0], 'a run of your own' if fit else '--out')
    flags = {'postprocessing': '--choose_postprocessing', 'temperature': '--fit_temperature'}
    if isinstance(fit, str) or not set(fit) <= set(flags):
        raise ConfigError(f'fit is {fit!r}: give a list of {" and ".join(map(repr, flags))}')
    if fit and (data or split != 'validation'):
        raise ConfigError(
            f'{flags[min(fit)]} is for --split=validation only: fitted on other cases, it would be '
            'tested on the same cases'
        )


def _about(runs: Sequence[Run], workdirs: Sequence[Path], config) -> dict[str, Any]:
    """The config, the run's step, and the steps that it passed over; the members of an ensemble."""
    found = [
        {'step': run.step, 'passed_over': {str(n): why for n, why in run.passed_over.items()}}
        for run in runs
    ]
    members = [
        {'workdir': str(workdir), 'seed': run.config.seed, **about}
        for workdir, run, about in zip(workdirs, runs, found, strict=True)
    ]
    return found[0] | {'config': to_dict(config)} | ({'members': members} if members[1:] else {})


def _programs(run: Run, config) -> Callable[[bool], PredictFn]:
    """A function that compiles the network with the mirror image (True) or without."""
    variables, options = jax.device_put(run.variables), program_options(config)

    @functools.cache
    def program(flip: bool) -> PredictFn:
        compiled = infer.compile_predict(
            run.model, ensemble=run.members > 1, **options | {'flip': flip}
        )
        return functools.partial(compiled, variables)

    return program


def _keep(
    save: Callable,
    workdir: str | Path,
    step: int,
    seen: Mapping[str, Any],
    split: str,
    facts: Mapping[str, Any],
) -> None:
    """`save` what was fitted for a step and its views, on the first host, before any reads it."""
    if hosts.is_first():
        save(workdir, {'step': step, 'views': seen, 'split': split, **facts})
    hosts.wait_for_all()


def _save_picture(
    folder: Path, digests: list[list[Any]], names: Sequence[str], volume: Volume, pred: np.ndarray
) -> None:
    """Write FOLDER/pictures/PATIENT.png, and append the patient and its slices' digests."""
    digests.append([volume.patient, [*map(volumes.picture_digest, volume.image)]])
    picture = visualize.volume_picture(volume, pred, names)
    with writing(folder / 'pictures' / f'{volume.patient}.png') as aside:
        Image.fromarray(picture).save(aside, 'png')


def _write(
    workdir: str | Path,
    folder: Path,
    result: dict[str, Any],
    predict: Callable[[Volume], tuple[np.ndarray, np.ndarray]],
    open_volumes: Callable[[Sequence[str]], Iterator[Volume]],
    ignore_label: int,
    command: str,
) -> None:
    """Write FOLDER/evaluation.json and report.html, and print the table."""
    path = folder / 'evaluation.json'
    write_json(path, result)

    # The median patient is known only now: the few that are shown are predicted again.
    roles = {row['patient']: role for role, row in report.extremes(result['patients'])}
    cases = {}
    for volume in open_volumes(list(roles)):
        shown = with_ignored(volume, ignore_label)
        cases[volume.patient] = report.make_case(shown, *predict(volume))
    shown = [(role, cases[name]) for name, role in roles.items()]
    page = report.write(workdir, result, shown, command, folder=folder)
    print(table(result))
    say(f'written to {path} and {page}; pictures in {folder / "pictures"}')


def _copy_to(workdir: Path, folder: Path) -> None:
    for name in ('evaluation.json', 'report.html'):
        with writing(workdir / name) as aside:
            shutil.copyfile(folder / name, aside)


def _command(workdirs: Sequence[Path], options: Mapping[str, Any]) -> str:
    """The shell command that makes the same page again."""
    named = [f'zoo:{each.name}' if each.parent == paths.ZOO else each for each in workdirs]
    flags = {'workdir': named} | {key: value for key, value in options.items() if value is not None}
    words = [
        f'--{"config." * ("." in key)}{key}='
        f'{",".join(map(str, value)) if isinstance(value, tuple | list) else value}'
        for key, value in flags.items()
    ]
    return shlex.join(['python', '-m', 'pspnet_jax.evaluate', *words])


def tell_overlap(
    workdirs: Sequence[str | Path], digests: Mapping[str, Sequence[str]], w: Words
) -> dict[str, dict[str, list[str]] | None]:
    """{'overlap': `splits.overlap` with the runs' training and validation cases}; logs it.

    The overlap is None if it is unknown for a run.
    """
    kept = [paths.local(workdir) / splits.KEPT for workdir in workdirs]
    found = [splits.overlap(path, digests) for path in kept]
    for path, one in zip(kept, found, strict=True):
        if one is None and hosts.is_first():
            logger.warning(
                'it is not known whether the run was trained on these images: %s is missing, '
                'corrupted, or has no digests of images', path,
            )  # fmt: skip
    if None in found:
        return {'overlap': None}
    together = {
        key: [name for name in digests if any(name in one[key] for one in found)]
        for key in ('train', 'validation', 'same_name')
    }
    said = {
        'train': 'have images that the run was trained on: these results are too optimistic',
        'validation': 'have images of its validation set, by which its checkpoint was chosen',
        'same_name': 'have the name of one of these, but other images',
    }
    for key, finding in said.items():
        if (names := together[key]) and hosts.is_first():
            counted = f'{len(names)} of {len(digests)} {w.case}s'
            logger.warning('%s %s: %s', counted, finding, some(names, 5))
    return {'overlap': together}


def _is_folder(config, data: str) -> bool:
    """Whether --data holds the config's folder of images, and is not in Kaggle's layout."""
    place = Path(data).expanduser() / sources.elsewhere(config, data)['images'][0]
    return bool(data) and pairing.split(place)[0].is_dir()


def _own_part(workdir: Path) -> str:
    """The part that training evaluates: 'test', or 'validation' if that is empty."""
    with contextlib.suppress(DataError):  # reported later, when the split is read for the data
        parts, _ = splits.listed(workdir / splits.KEPT)
        if not parts['test'] and parts['validation']:
            return 'validation'
    return 'test'


def _check_known(config, split: str) -> None:
    """Raise DataError if the run names data that this user has not trained on here."""
    places = sources.places(config)
    if places and not paths.are_known(places):
        raise DataError(
            f'the run was trained on {", ".join(places)}, which you have not used for training on '
            f'this machine: if that is the data you expect, add --data={places[0]} --split={split}'
        )


def _volume_source(
    config,
    workdir,
    split: str,
    data: str,
    run: Run,
    group: str | None,
    loaded: Loaded | None,
) -> tuple[list[str], Callable[[Sequence[str] | None], Iterator[Volume]], bool]:
    """(patients in order, `open_volumes`, whether they are the part that training evaluates).

    `open_volumes(patients=None)` yields the volumes to evaluate, or those of these patients, with
    the network's channels and with intensities measured as the run measures them.
    """
    if group is not None and not _is_folder(config, data):
        raise ConfigError('--group is for --data=FOLDER with images/ and masks/')
    kept = Path(workdir) / splits.KEPT
    if _is_folder(config, data):
        where = sources.elsewhere(config, data) | {'group': sources.grouping(config, group)}
        slices = sources.read_folder(config, **where)
        parts = splits.read(kept, slices) if split else {split: list(slices.intensity)}
    elif data:
        from pspnet_jax.data import lgg

        found = lgg.check(data, size=None)
        if split:
            wanted = set(splits.listed(kept)[0][split])
            found = [case for case in found if case.patient in wanted]
            if lost := sorted(wanted - {case.patient for case in found}):
                raise DataError(
                    f'{data} has no {some(lost)}, which {kept} lists under {split!r}: give the '
                    'data that the run was trained on'
                )

        def open_folder(patients: Sequence[str] | None = None) -> Iterator[Volume]:
            chosen = [case for case in found if patients is None or case.patient in patients]
            cases = (lgg.read_case(case, size=None) for case in chosen)
            found_volumes = (volumes.with_intensity(volume, run.measured) for volume in cases)
            return (volumes.with_channels(volume, run.channels) for volume in found_volumes)

        return [case.patient for case in found], open_folder, False
    else:
        slices, parts = loaded or sources.load(config, kept if kept.exists() else '')
    sources.check_class_names(slices, config)
    if not parts[split]:
        raise DataError(f'the split {split!r} has no case in this data set: give another --split')

    def open_split(patients: Sequence[str] | None = None) -> Iterator[Volume]:
        chosen = parts[split]
        if patients is not None:  # a case with slices of several sizes is split: 'NAME 32x40'
            begin = tuple(f'{name} ' for name in chosen)
            found = {
                name.rsplit(' ', 1)[0] if name.startswith(begin) else name for name in patients
            }
            chosen = [name for name in chosen if name in found]
        for volume in volumes.iterate_volumes(volumes.select(slices, chosen), run.measured):
            own = volume.patient
            if patients is None or own in patients or own.rsplit(' ', 1)[0] in patients:
                yield volumes.with_channels(volume, run.channels)

    own = not data and split == ('test' if parts['test'] else 'validation')
    return sorted(parts[split]), open_split, own
