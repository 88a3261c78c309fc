"""What an experiment is: every knob with its default (`base`), configs that are ready to run
(`lgg`, `folder`, `phantom`), recipes of augmentation, what a knob may be (`rules`), and flags.
"""

from pspnet_jax.config.rules import (
    CHANGEABLE,
    RULES,
    flatten,
    from_dict,
    nearest,
    to_dict,
    validate,
    with_absolute_paths,
    with_prediction,
    without_paths,
)

__all__ = [
    'CHANGEABLE',
    'RULES',
    'flatten',
    'from_dict',
    'nearest',
    'to_dict',
    'validate',
    'with_absolute_paths',
    'with_prediction',
    'without_paths',
]
