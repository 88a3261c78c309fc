"""The files that a prediction writes, and their names."""

import errno
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from pspnet_jax.data import formats
from pspnet_jax.data.formats import Picture
from pspnet_jax.data.volumes import measure_intensity
from pspnet_jax.evaluation import visualize
from pspnet_jax.inference.predictors import Predictor
from pspnet_jax.prediction.inputs import stem_of
from pspnet_jax.runtime.errors import DataError
from pspnet_jax.runtime.storage import writing

KINDS = ('mask', 'probability', 'overlay', 'outline', 'panels')
USUAL = ('mask', 'overlay', 'panels')


def name_results(root: Path, found: Sequence[Path]) -> tuple[dict[Path, Path], list[str]]:
    """{file: its results' name without ending}, and a fault for each name that is taken twice."""
    stems, faults = {}, []
    for path in found:
        stem = path.relative_to(root).parent / stem_of(path)
        if stem in stems:
            faults.append(f'{path} would overwrite the results of {stems[stem]}: rename one')
        else:
            stems[stem] = path
    return {path: stem for stem, path in stems.items()}, faults


def result_names(kind: str, num_classes: int) -> dict[int, str]:
    """{class: the result's name}; only probabilities have one per class."""
    if kind == 'probability' and num_classes > 2:
        return {label: f'{kind}_{label}' for label in range(1, num_classes)}
    return {1: kind}


def write_results(
    item, *, predictor: Predictor, save: Sequence[str], note_of: Mapping[Path, Callable]
) -> tuple[int, list[str]]:
    """Write the results of an item of `_predict_chunks`; return (number of its files, faults).

    `note_of[stem]` is called when its results are 'begun' and 'done'. Raises DataError, except for
    a name that is too long for the file system, which is a fault of that file.
    """
    count, predicted, faults = item
    config = predictor.config
    for case, labels_DHW, prob_DHWK in predicted:
        first, shown = 0, case.intensity
        if predictor.intensity is not None and case.image.dtype != np.uint8:
            shown = measure_intensity(case.image)  # the run's own range is too wide to view
        for picture, stem in zip(case.pictures, case.stems, strict=True):
            part = slice(first, first + len(picture.image))
            first = part.stop
            prob = None if prob_DHWK is None else prob_DHWK[part]
            note_of[stem]('begun')
            try:
                _write(stem, picture, case.image[part], shown, labels_DHW[part], prob,
                       save=save, config=config)  # fmt: skip
            except DataError as error:
                if getattr(error.__cause__, 'errno', 0) != errno.ENAMETOOLONG:
                    raise
                faults.append(
                    f'{picture.source}: with _{save[0]} added, the name is too long for this disk: '
                    'rename the file'
                )
            else:
                note_of[stem]('done')
    return count, faults


def _write(
    stem: Path,
    picture: Picture,
    image_DHWC: np.ndarray,
    intensity: np.ndarray,
    labels_DHW: np.ndarray,
    prob_DHWK: np.ndarray | None,
    *,
    save: Sequence[str],
    config: ConfigDict,
) -> None:
    """Write the results of one file."""
    num_classes, ending = config.model.num_classes, formats.output_suffix(picture)
    d = int((labels_DHW > 0).sum((1, 2)).argmax())
    shown = visualize.to_uint8(image_DHWC[d], intensity[0], intensity[1])
    for kind in save:
        for label, name in result_names(kind, num_classes).items():
            path = stem.with_name(f'{stem.name}_{name}')
            if kind == 'mask':
                shades = num_classes == 2 and ending in ('.png', '.tif')
                values = labels_DHW * np.uint8(255) if shades else labels_DHW
                palette = visualize.label_palette() if num_classes > 2 else None
                formats.write_labels(f'{path}{ending}', values, picture, palette)
            elif kind == 'probability':
                formats.write_probabilities(f'{path}{ending}', prob_DHWK[..., label], picture)
            else:
                drawn = captioned if kind == 'panels' else functools.partial(draw, kind)
                pixels = drawn(shown, labels_DHW[d], config.model.class_names)
                with writing(Path(f'{path}.png')) as aside:
                    Image.fromarray(pixels).save(aside, 'png')


def draw(kind: str, image_HWC: np.ndarray, mask_HW: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The RGB picture of a kind of result; its size depends only on the image's size."""
    if kind == 'panels':
        return visualize.three_panels(image_HWC, mask_HW)
    drawn = visualize.outline if kind == 'outline' else visualize.overlay
    return visualize.legend(drawn(image_HWC, mask_HW), mask_HW, names)


def captioned(image_HWC: np.ndarray, mask_HW: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The panels with captions above and a legend below."""
    panels = [
        ('image', visualize.to_rgb(image_HWC)),
        ('mask', visualize.mask_picture(mask_HW)),
        ('outline', visualize.outline(image_HWC, mask_HW)),
    ]
    return visualize.framed(panels, visualize.class_keys(mask_HW, names))
