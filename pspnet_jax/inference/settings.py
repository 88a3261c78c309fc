"""The arguments of prediction, from a config."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pspnet_jax.config import with_prediction
from pspnet_jax.inference import choice

logger = logging.getLogger(__name__)


def program_options(config) -> dict[str, Any]:
    """The keyword arguments of `infer.compile_predict` that a config decides."""
    predict = config.predict
    return {
        'size': config.data.size,
        'fit': config.data.fit,
        'window': predict.window,
        'overlap': predict.overlap,
        'batch_size': config.eval.batch_size,
        'scales': predict.scales,
        'flip': predict.flip,
        'crf_options': crf_options(config),
    }


def crf_options(config) -> dict[str, Any]:
    """The keyword arguments of `infer.refine` that a config decides."""
    return config.crf.to_dict() | {'context': config.data.context}


def views(config) -> dict[str, Any]:
    """The settings that affect the probabilities, as JSON; those without effect are left out.

    A temperature is fitted for a checkpoint and these settings.
    """
    predict, crf = config.predict, config.crf.to_dict()
    found = {'scales': list(predict.scales), 'flip': predict.flip, 'window': predict.window}
    if predict.window:
        found['overlap'] = predict.overlap
    if crf['kernel'] == 'exact':
        del crf['window']
    return {**found, 'crf': crf if crf['kernel'] != 'none' else {'kernel': 'none'}}


def label_options(config) -> dict[str, Any]:
    """How labels are made from the probabilities, for `predict_foreground`."""
    predict = config.predict
    return {
        'threshold': predict.threshold,
        'largest_component': predict.largest_component,
        'min_size': predict.min_size,
    }


def with_choice(
    config, workdir: str | Path, step: int, changes: Mapping[str, Any]
) -> tuple[Any, dict[str, Any] | None]:
    """(config to predict with, the choice that it applies or None).

    `changes` override what was chosen on validation for this checkpoint and its views, which
    overrides the config. The choice has the 'options' that apply, those that are 'given' instead,
    and the validation 'dice' of the whole choice and 'without' it. It is logged.
    """
    wanted = with_prediction(config, changes)
    kept = choice.load(workdir, config, step, choice_views(wanted))
    if kept is None:
        return wanted, None
    options = {key: value for key, value in kept['options'].items() if key not in changes}
    if not options:
        return wanted, None
    chosen = {
        'options': options,
        'given': [key for key in kept['options'] if key in changes],
        **{key: kept[key] for key in ('dice', 'without', 'patients')},
    }
    logger.info('%s: %s', Path(workdir) / choice.KEPT, choice.describe(chosen))
    return with_prediction(config, {**options, **changes}), chosen


def choice_views(config) -> dict[str, Any]:
    """The `views` for which post-processing is chosen; flip is part of the choice itself."""
    return {key: value for key, value in views(config).items() if key != 'flip'}
