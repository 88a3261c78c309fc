"""Pictures: uint8 arrays in, uint8 RGB arrays out."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pspnet_jax.data.volumes import IGNORE_LABEL, Volume, lesion_pixels

# Okabe and Ito's colours, told apart by colour-blind eyes: class 1, 2, ...
COLORS = np.array(
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66],
     [0, 114, 178], [213, 94, 0], [204, 121, 167]], np.uint8
)  # fmt: skip


DIFFERENCE = {
    1: ('in both', (150, 205, 190)),
    2: ('predicted only', (213, 94, 0)),
    3: ('missed', (60, 150, 230)),
    4: ('another class', (204, 121, 167)),
}
# Black, purple, orange, yellow, white at 0, 1/4, 1/2, 3/4, 1: lightness rises all along.
HEAT = np.stack(
    [np.interp(np.arange(256), (0, 64, 128, 192, 255), c)
     for c in ((0, 90, 205, 250, 255), (0, 20, 70, 170, 255), (0, 110, 70, 30, 220))], axis=-1
).astype(np.uint8)  # fmt: skip


def class_color(label: int) -> np.ndarray:
    """RGB uint8 of class `label` >= 1; they repeat after seven."""
    return COLORS[(label - 1) % len(COLORS)]


def to_uint8(image_HWC: np.ndarray, low_C: np.ndarray, high_C: np.ndarray) -> np.ndarray:
    """H W C uint8 to look at: 8 bits as they are, of other kinds low..high as 0..255."""
    if image_HWC.dtype == np.uint8:
        return image_HWC
    share = (image_HWC.astype(np.float32) - low_C) / np.maximum(high_C - low_C, 1e-6)
    return np.rint(255 * np.clip(share, 0, 1)).astype(np.uint8)


def to_rgb(image_HWC: np.ndarray) -> np.ndarray:
    """H W 3 uint8 to look at: three channels as they are, else the first in grey.

    Of other kinds than 8 bits its own range is 0..255.
    """
    image = image_HWC if image_HWC.shape[-1] == 3 else np.repeat(image_HWC[..., :1], 3, axis=-1)
    return to_uint8(image, image.min(axis=(0, 1)), image.max(axis=(0, 1))).copy()


def overlay(image_HWC: np.ndarray, mask_HW: np.ndarray, alpha: float = 0.45) -> np.ndarray:
    """The picture with each class tinted in its colour."""
    picture = to_rgb(image_HWC).astype(np.float32)
    for label in np.unique(mask_HW[mask_HW > 0]):
        inside = mask_HW == label
        picture[inside] = (1 - alpha) * picture[inside] + alpha * class_color(label)
    return picture.astype(np.uint8)


def legend(picture_HWC: np.ndarray, mask_HW: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The RGB picture with colour and name of each class in the mask, in its upper left corner.

    `names` are of all classes, background first; without, they are 'class 1' ... A picture that
    the box would take more than half of stays as it is.
    """
    labels = np.unique(mask_HW[mask_HW > 0]).tolist()
    size = min(max(len(picture_HWC) // 24, 10), 40)
    font, row = ImageFont.load_default(size), round(1.4 * size)
    words = [names[label] if names else f'class {label}' for label in labels]
    width = round(2.4 * size + max((font.getlength(word) for word in words), default=0))
    height = row * len(labels) + size // 2
    if not labels or 2 * width > picture_HWC.shape[1] or 2 * height > len(picture_HWC):
        return picture_HWC
    canvas = Image.fromarray(picture_HWC)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, width, height), fill=(0, 0, 0))
    for i, (label, word) in enumerate(zip(labels, words, strict=True)):
        left, top = size // 2, size // 3 + row * i
        draw.rectangle(
            (left, top, left + size, top + size), fill=tuple(class_color(label).tolist())
        )
        draw.text((left + 1.4 * size, top + size / 2), word, (255, 255, 255), font, anchor='lm')
    return np.array(canvas)


def outline(
    image_HWC: np.ndarray, mask_HW: np.ndarray, color: np.ndarray | None = None
) -> np.ndarray:
    """The picture with a one-pixel line along the inner edge of each class."""
    picture = to_rgb(image_HWC)
    for label in np.unique(mask_HW[mask_HW > 0]):
        inside = mask_HW == label
        edge = inside & ~ndimage.binary_erosion(inside)
        picture[edge] = class_color(label) if color is None else color
    return picture


def mask_picture(mask_HW: np.ndarray) -> np.ndarray:
    """Class 1 white, further classes in their colours, on black."""
    picture = np.zeros((*mask_HW.shape, 3), np.uint8)
    picture[mask_HW == 1] = 255
    for label in np.unique(mask_HW[mask_HW > 1]):
        picture[mask_HW == label] = class_color(label)
    return picture


def label_palette() -> np.ndarray:
    """(256, 3) uint8: the colour of each label; background black, ignored grey."""
    palette = np.stack([class_color(label) for label in range(1, 257)])
    return np.concatenate([[[0, 0, 0]], palette[:254], [[128, 128, 128]]]).astype(np.uint8)


def difference_palette() -> np.ndarray:
    """(5, 3) uint8: the colours of `difference`; where there is none, black."""
    return np.array([(0, 0, 0), *(color for _, color in DIFFERENCE.values())], np.uint8)


def difference(pred_HW: np.ndarray, true_HW: np.ndarray) -> np.ndarray:
    """H W uint8: a key of DIFFERENCE; 0 where both are background or the truth is ignored."""
    pred, true = pred_HW > 0, true_HW > 0
    found = np.where(pred_HW == true_HW, 1, 4)
    found = np.where(pred & ~true, 2, np.where(true & ~pred, 3, found))
    return np.where((pred | true) & (true_HW != IGNORE_LABEL), found, 0).astype(np.uint8)


def three_panels(image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """H 3W+gaps 3: original, predicted mask, outline on the original (the blog's figure)."""
    gap = np.full((image_HWC.shape[0], 4, 3), 255, np.uint8)
    panels = (to_rgb(image_HWC), gap, mask_picture(mask_HW), gap, outline(image_HWC, mask_HW))
    return np.concatenate(panels, axis=1)


def volume_picture(volume: Volume, pred_DHW: np.ndarray) -> np.ndarray:
    """H 3W 3: the slice with most lesion, with its true and its predicted outline."""
    pixels = [lesion_pixels(mask_HW) for mask_HW in volume.mask]
    d = int(np.argmax(pixels)) if any(pixels) else len(pixels) // 2
    image, gap = volume.image[d], np.full((volume.image.shape[1], 4, 3), 255, np.uint8)
    panels = (to_rgb(image), gap, outline(image, volume.mask[d]), gap, outline(image, pred_DHW[d]))
    return np.concatenate(panels, axis=1)
