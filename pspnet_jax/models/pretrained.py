"""ImageNet weights into a backbone: named, strict both ways, and reported."""

import re
from pathlib import Path
from typing import Any

import flax
import numpy as np

from pspnet_jax.errors import PretrainedError

# torchvision's vgg16 numbers its layers in order, ReLU and pooling included.
_VGG16_CONVOLUTIONS = (
    (0, 'conv1_1'), (2, 'conv1_2'), (5, 'conv2_1'), (7, 'conv2_2'),
    (10, 'conv3_1'), (12, 'conv3_2'), (14, 'conv3_3'), (17, 'conv4_1'), (19, 'conv4_2'),
    (21, 'conv4_3'), (24, 'conv5_1'), (26, 'conv5_2'), (28, 'conv5_3'),
)  # fmt: skip
# Classifier layers that a segmentation backbone has no place for.
_VGG16_UNUSED = re.compile(r'classifier\.[036]\.(weight|bias)')


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """{name: array} of a .safetensors or .npz file. Nothing in it is executed."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise PretrainedError(f"model.pretrained={path} is not a file: give the weights' path")
    try:
        if path.suffix == '.safetensors':
            from safetensors.numpy import load_file

            return load_file(path)
        if path.suffix == '.npz':
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except Exception as error:  # each reader raises its own kinds
        reason = str(error).splitlines()[0]
        raise PretrainedError(f'{path} is not a readable weight file: {reason}') from error
    raise PretrainedError(f'{path.name} ends in neither .safetensors nor .npz: convert it')


def vgg16_from_torchvision(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{'conv1_1/kernel': HWIO, ...} from torchvision's names and OIHW layout."""
    module_of = {f'features.{number}': name for number, name in _VGG16_CONVOLUTIONS}
    converted = {}
    for name, array in arrays.items():
        layer, _, kind = name.rpartition('.')
        if layer in module_of and kind == 'weight':
            converted[f'{module_of[layer]}/kernel'] = np.transpose(array, (2, 3, 1, 0))
        elif layer in module_of and kind == 'bias':
            converted[f'{module_of[layer]}/bias'] = array
        elif not _VGG16_UNUSED.fullmatch(name):
            converted[f'(unknown) {name}'] = array
    return converted


def load_vgg16(params: dict[str, Any], path: str | Path) -> tuple[dict[str, Any], str]:
    """`params` with its backbone from the file, and a report of what was loaded.

    Every array of the backbone must be in the file with its shape, and every
    convolution of the file in the backbone; else PretrainedError lists both sides.
    """
    wanted = flax.traverse_util.flatten_dict(params['backbone'], sep='/')
    found = vgg16_from_torchvision(read_arrays(path))
    faults = [f'the model has {name}, the file has not' for name in wanted.keys() - found.keys()]
    faults += [f'the file has {name}, the model has not' for name in found.keys() - wanted.keys()]
    faults += [
        f'{name} is {wanted[name].shape} in the model, {found[name].shape} in the file'
        for name in wanted.keys() & found.keys()
        if wanted[name].shape != found[name].shape
    ]
    if faults:
        raise PretrainedError('\n  '.join([f'{path} does not fit the backbone:', *sorted(faults)]))
    loaded = {name: np.asarray(found[name], np.float32) for name in wanted}
    backbone = flax.traverse_util.unflatten_dict(loaded, sep='/')
    random = sorted(name for name in params if name != 'backbone')
    report = (
        f'{len(loaded)} arrays of the backbone loaded from {path} '
        f'({sum(a.size for a in loaded.values()):,} values); random: {", ".join(random)}'
    )
    return {**params, 'backbone': backbone}, report
