"""A training step of the recipe in configs/lgg.py:mobilenet_unet in PyTorch, for speed.py.

Augmentation changes a whole batch of tensors at once, as kornia does: that is faster than one image
after another. Its draws are those of pspnet_jax.data.augment in kind and range.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

IGNORE_LABEL = 255


def make_step(
    module: nn.Module, run: nn.Module, image_BCHW, labels_BHW, recipe: Mapping[str, Any]
) -> Callable[[], None]:
    """A step of `recipe`, a config of ours as a dictionary, that changes `module`.

    `run` is `module` or what torch.compile made of it. The step augments the batch, and goes on
    with cross-entropy and Dice, AdamW and the average of the parameters. Learning rates are
    constant.
    """
    options, decay = recipe['optim'], recipe['train']['ema_decay']
    groups = []
    for name, parameter in module.named_parameters():
        new = 1.0 if name.startswith('encoder.') else options['new_layer_factor']
        groups.append({
            'params': [parameter],
            'lr': options['learning_rate'] * new,
            'weight_decay': options['weight_decay'] if parameter.ndim > 1 else 0.0,
        })  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(options['momentum'], options['beta2']))
    parameters = list(module.parameters())
    average = [parameter.detach().clone() for parameter in parameters]

    def step():
        seen, truth = augment(image_BCHW, labels_BHW, recipe['augment'])
        logits = run(seen.contiguous(memory_format=memory_format(image_BCHW)))
        loss = functional.cross_entropy(logits, truth, ignore_index=IGNORE_LABEL)
        optimizer.zero_grad(set_to_none=True)
        (loss + soft_dice(logits, truth)).backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - decay)

    return step


def memory_format(image_BCHW: torch.Tensor) -> torch.memory_format:
    last = image_BCHW.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def soft_dice(logits_BKHW: torch.Tensor, labels_BHW: torch.Tensor) -> torch.Tensor:
    """Of the one structure of two classes."""
    counted_BHW = labels_BHW != IGNORE_LABEL
    prob_BHW = logits_BKHW.softmax(1)[:, 1] * counted_BHW
    true_BHW = (labels_BHW == 1).float()
    return 1 - (2 * (prob_BHW * true_BHW).sum() + 1) / ((prob_BHW + true_BHW).sum() + 1)


@torch.no_grad()
def augment(
    image_BCHW: torch.Tensor, labels_BHW: torch.Tensor, options: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch with the changes of `options`, the section `augment`: each image has its own."""
    B, C, H, W = image_BCHW.shape
    grid = sampling_grid(B, (H, W), options)
    lowest = image_BCHW.amin((2, 3), keepdim=True)
    image = functional.grid_sample(image_BCHW - lowest, grid, 'bilinear', align_corners=True)
    image = image + lowest
    labels = (labels_BHW[:, None] - IGNORE_LABEL).float()  # what is outside becomes 0
    labels = functional.grid_sample(labels, grid, 'nearest', align_corners=True)
    labels = (labels[:, 0] + IGNORE_LABEL).long()

    for b in chosen(B, options['blur_probability']):
        image[b] = blurred(image[b], options['blur'] * torch.rand(()).item())
    for b in chosen(B, options['low_resolution_probability']):
        zoom = 1 - options['low_resolution'] * torch.rand(()).item()
        small = [max(round(zoom * n), 1) for n in image.shape[2:]]
        low = functional.interpolate(image[b][None], small, mode='nearest-exact')
        image[b] = functional.interpolate(low, image.shape[2:], mode='bilinear')[0]
    if powers := chosen(B, options['gamma_probability']):
        limit = math.log1p(options['gamma'])
        image[powers] = power(image[powers], uniform(limit, (len(powers), C, 1, 1)).exp())
    image = image * (1 + uniform(options['gain'], (B, C, 1, 1)))
    image = image + uniform(options['bias'], (B, C, 1, 1))
    if options['noise']:
        image = image + options['noise'] * torch.rand(B, 1, 1, 1) * torch.randn_like(image)
    return image, labels


def chosen(number: int, probability: float) -> list[int]:
    return (torch.rand(number) < probability).nonzero()[:, 0].tolist()


def uniform(limit: float, shape: tuple[int, ...]) -> torch.Tensor:
    return limit * (2 * torch.rand(shape) - 1)


def sampling_grid(B: int, size: tuple[int, int], options: Mapping[str, Any]) -> torch.Tensor:
    """B h w 2 for grid_sample: mirror, zoom, rotation, elastic deformation and crop."""
    H, W = size
    crop = options['crop'] or min(size)
    rows, columns = (torch.arange(crop) - (crop - 1) / 2 for _ in range(2))
    over, aside = (
        1 - 2 * (torch.rand(B, 1, 1) < options[name]).float() for name in ('flip_vertical', 'flip')
    )
    rows, columns = over * rows[:, None], aside * columns
    angle = uniform(math.radians(options['rotate']), (B, 1, 1))
    zoom = uniform(math.log1p(options['scale']), (B, 1, 1)).exp()
    rows, columns = (
        zoom * (angle.cos() * rows - angle.sin() * columns) + uniform((H - crop) / 2, (B, 1, 1)),
        zoom * (angle.sin() * rows + angle.cos() * columns) + uniform((W - crop) / 2, (B, 1, 1)),
    )
    field = options['elastic'] * torch.randn(B, 2, 4, 4)
    field = functional.interpolate(field, (crop, crop), mode='bicubic')
    rows, columns = rows + field[:, 0], columns + field[:, 1]
    return torch.stack((columns * 2 / (W - 1), rows * 2 / (H - 1)), dim=3)


def blurred(image_CHW: torch.Tensor, sigma: float) -> torch.Tensor:
    """A Gaussian of 7 taps, along columns and rows."""
    taps = torch.exp(-0.5 * (torch.arange(-3.0, 4.0) / max(sigma, 1e-3)) ** 2)
    taps, x = taps / taps.sum(), functional.pad(image_CHW, (3, 3, 3, 3), mode='replicate')[:, None]
    x = functional.conv2d(functional.conv2d(x, taps.view(1, 1, 7, 1)), taps.view(1, 1, 1, 7))
    return x[:, 0]


def power(image_BCHW: torch.Tensor, exponent_BC11: torch.Tensor) -> torch.Tensor:
    """Each channel to a power, with its mean and deviation restored."""
    low, high = image_BCHW.amin((2, 3), True), image_BCHW.amax((2, 3), True)
    changed = ((image_BCHW - low) / (high - low).clamp(min=1e-6)) ** exponent_BC11
    deviation, mean = torch.std_mean(image_BCHW, (2, 3), keepdim=True)
    own_deviation, own_mean = torch.std_mean(changed, (2, 3), keepdim=True)
    return (changed - own_mean) * (deviation / own_deviation.clamp(min=1e-6)) + mean
