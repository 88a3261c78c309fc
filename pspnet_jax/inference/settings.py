"""The arguments of prediction, taken from a config."""

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
    """What decides the probabilities beside the checkpoint, as JSON has it: a temperature is
    fitted for these. What has no effect is left out.
    """
    predict, crf = config.predict, config.crf.to_dict()
    found = {'scales': list(predict.scales), 'flip': predict.flip, 'window': predict.window}
    if predict.window:
        found['overlap'] = predict.overlap
    if crf['kernel'] == 'exact':
        del crf['window']
    return {**found, 'crf': crf if crf['kernel'] != 'none' else {'kernel': 'none'}}


def label_options(config) -> dict[str, Any]:
    """Those of `predict_foreground`: what is made of the probabilities."""
    predict = config.predict
    return {
        'threshold': predict.threshold,
        'largest_component': predict.largest_component,
        'min_size': predict.min_size,
    }


def with_choice(
    config, workdir: str | Path, step: int, changes: Mapping[str, Any]
) -> tuple[Any, dict[str, Any] | None]:
    """(the config to predict with, what it has of a choice): its own `predict` section, then what
    was chosen on validation for this checkpoint and its views, then `changes`.

    The second has the 'options' that were taken, those 'given' in their place, and the validation
    Dice of the whole choice and 'without' it; None where nothing is taken. The log says it.
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
    """The `views` that post-processing is chosen for: the mirror image is part of the choice."""
    return {key: value for key, value in views(config).items() if key != 'flip'}
