"""Python functions for scripts and notebooks.

  import pspnet_jax
  model = pspnet_jax.train('vgg_pspnet', images='own/images', masks='own/masks', workdir='runs/own')
  model = pspnet_jax.load('runs/own')
  mask = model.predict('picture.png')
  figures = model.evaluate('other/images', 'other/masks')

They are the commands' own functions; all other options are keys of the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The functions import JAX and all that needs it, so `import pspnet_jax` and --help are fast.
if TYPE_CHECKING:
    import numpy as np
    from ml_collections import ConfigDict

    from pspnet_jax.inference.predictors import Predictor


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained network, made by `load` and `train`."""

    predictor: Predictor
    workdir: str | Path | Sequence[str | Path]

    def __repr__(self) -> str:
        model, runs = self.config.model, self.predictor.runs
        name = f'{model.name} on {model.backbone}' if model.backbone else model.name
        places = ', '.join(f'step {run["step"]} of {run["workdir"]}' for run in runs)
        return f'<Model {name}, {model.num_classes} classes: {places}>'

    @property
    def config(self) -> ConfigDict:
        return self.predictor.config

    def predict(self, image: np.ndarray | str | Path) -> np.ndarray:
        """H W uint8 class numbers of an image: a file, or an array H W or H W C.

        Its intensities are measured as those of a whole volume: use `predict_volume` for the slices
        of a volume. Raises DataError.
        """
        return self._labels_and_probabilities(image)[0]

    def predict_probabilities(self, image: np.ndarray | str | Path) -> np.ndarray:
        """H W K float32 probabilities of an image as in `predict`."""
        return self._labels_and_probabilities(image)[1]

    def predict_volume(self, volume: np.ndarray | str | Path) -> np.ndarray:
        """D H W uint8 class numbers of a volume: a file (NIfTI, TIFF, DICOM), or an array D H W C.

        A file's mask has the orientation of `data.formats.read`.
        """
        from pspnet_jax.data import formats
        from pspnet_jax.inference import predictors

        image = formats.read(volume).image if isinstance(volume, str | Path) else volume
        return predictors.predict_array(self.predictor, image)[0]

    def evaluate(
        self, images: str | Path, masks: str | Path, *, group: str | None = None
    ) -> dict[str, Any]:
        """The metrics of `evaluation.scores.evaluate_volumes` for folders of images and masks.

        `group` replaces the run's `data.group`, which tells which images belong together. The log,
        'overlap' of 'data' and 'seen' of each case tell which cases the run was trained on.
        """
        from pspnet_jax.data import pairing, sources, volumes
        from pspnet_jax.evaluation.protocol import mark_seen, tell_overlap
        from pspnet_jax.evaluation.scores import evaluate_options, evaluate_volumes
        from pspnet_jax.evaluation.words import words_for
        from pspnet_jax.inference.settings import label_options

        config = self.config
        rules = [pairing.split(Path(place))[1] for place in config.data.images]
        folder = Path(images).absolute()
        named = tuple(str(folder / rule) for rule in rules if rule != pairing.STEM)
        slices = sources.read_folder(
            config,
            source='',
            images=named or (str(folder),),
            masks=str(Path(masks).absolute()),
            group=sources.grouping(config, group),
        )
        sources.check_class_names(slices, config)
        workdirs = [self.workdir] if isinstance(self.workdir, str | Path) else self.workdir
        digests = {}
        found = volumes.iterate_volumes(slices, self.predictor.measured)
        result = evaluate_volumes(
            self.predictor.predict_fn,
            (volumes.with_channels(volume, self.predictor.channels) for volume in found),
            temperature=self.predictor.temperature,
            **evaluate_options(config, self.predictor.intensity),
            label_options=label_options(config),
            each=lambda volume, _: digests.update(
                {volume.patient: [*map(volumes.picture_digest, volume.image)]}
            ),
        )
        result['data'] |= tell_overlap(workdirs, digests, words_for(result))
        mark_seen(result)
        result['postprocessing'] = self.predictor.chosen
        return result

    def _labels_and_probabilities(self, image):
        from pspnet_jax.data import formats
        from pspnet_jax.inference import predictors

        if isinstance(image, str | Path):
            (image,) = formats.read(image).image[:1]
        return predictors.predict_array(self.predictor, image)


def load(
    workdir: str | Path | Sequence[str | Path],
    *,
    checkpoint: str = '',
    **options: Any,
) -> Model:
    """Load the model of a training run, or an ensemble that averages several runs' probabilities.

    A name such as 'lgg' that is not a folder is a network that comes with the package, 'zoo:lgg'.
    `checkpoint` is 'best', 'last' or a step. `options` are keys of the config's `predict` section,
    such as flip=True, threshold=0.4 or window=512. Raises CheckpointError, ConfigError.
    """
    from pspnet_jax.inference import predictors
    from pspnet_jax.runtime import paths

    if isinstance(workdir, str) and workdir in paths.zoo() and not Path(workdir).exists():
        workdir = f'zoo:{workdir}'
    return Model(predictors.load(workdir, checkpoint, options), workdir)


def train(
    config: ConfigDict | str = 'pspnet_resnet50',
    *,
    images: str | Path | Sequence[str | Path] = (),
    masks: str | Path = '',
    workdir: str | Path = 'runs/last',
    changes: Mapping[str, Any] | None = None,
    **hooks: Any,
) -> Model:
    """Train a model, or resume a stopped run, and load it.

    `config` is a config, or the name of a network for images in `images` and `masks` (several
    folders of images are stacked as channels). `changes` are config values by dotted key,
    {'train.epochs': 20}. `hooks` are those of `training.loop.train_and_evaluate`, which also
    describes the errors.
    """
    from pspnet_jax.config import folder as own_pictures
    from pspnet_jax.runtime.errors import ConfigError
    from pspnet_jax.training.loop import train_and_evaluate

    named = isinstance(config, str)
    if isinstance(config, str):
        chosen = own_pictures.get_config(config)
    else:
        chosen = config.copy_and_resolve_references()
    if images or masks:
        folders = [images] if isinstance(images, str | Path) else list(images)
        chosen.data.name = 'folder'
        chosen.data.images = tuple(str(Path(path).absolute()) for path in folders)
        chosen.data.masks = str(Path(masks).absolute())
    elif named:
        raise ConfigError('no images: give train(NAME, images=FOLDER, masks=FOLDER), or a config')
    try:
        chosen.update_from_flattened_dict(dict(changes or {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'changes: {error}') from error
    train_and_evaluate(chosen, str(workdir), **hooks)
    return load(workdir)
