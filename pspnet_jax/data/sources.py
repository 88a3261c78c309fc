"""Where slices come from: one function a source, from the config's sections to `Slices`."""

from pspnet_jax.data import lgg, phantom, splits
from pspnet_jax.data.volumes import Slices

SOURCES = {
    'phantom': lambda config: phantom.load(**config.phantom),
    'lgg': lambda config: lgg.load(config.data.source, config.data.root),
}


def load(config) -> tuple[Slices, dict[str, list[str]]]:
    """Every slice of the config's data set, and the patients of each split."""
    slices = SOURCES[config.data.name](config)
    parts = splits.holdout(
        list(slices.intensity),
        test_patients=splits.LGG_HOLDOUT if config.data.name == 'lgg' else (),
        test_fraction=config.data.test_fraction,
        validation_fraction=config.data.validation_fraction,
        seed=config.data.split_seed,
    )
    return slices, parts
