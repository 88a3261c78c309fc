"""Pictures: uint8 arrays in, uint8 RGB arrays out.

A class has the same colour everywhere: in overlays, outlines, differences, masks and the report.
"""

import colorsys
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pspnet_jax.data.volumes import IGNORE_LABEL, Volume, lesion_pixels

# Class 1, 2, ...: distinct for colour-blind people, and so light that the colour or the black line
# next to it has a contrast of 3:1 with any grey (WCAG 2). The first two are Okabe and Ito's.
COLORS = np.array(
    [[230, 159, 0], [86, 180, 233], [0, 255, 180], [240, 165, 195],
     [240, 228, 66], [165, 255, 135], [150, 195, 120]], np.uint8
)  # fmt: skip
# {value of a difference: (words, colour)}, in colours that no class has. A voxel with the right
# class has that class's colour.
MISSED, FALSE, OTHER = 1, 2, 3
DIFFERENCE = {
    MISSED: ('missed', (0, 105, 165)),
    FALSE: ('false', (165, 60, 0)),
    OTHER: ('wrong class', (165, 0, 255)),
}
IGNORED = (128, 128, 128)
GAP = 4  # pixels between pictures side by side
LEAST = 160  # smallest width in pixels of a picture with a caption
Key = tuple[Sequence[int], str]  # an entry of a legend: a colour and its meaning
# Black, purple, orange, yellow, white at 0, 1/4, 1/2, 3/4, 1, with increasing lightness.
HEAT = np.stack(
    [np.interp(np.arange(256), (0, 64, 128, 192, 255), c)
     for c in ((0, 90, 205, 250, 255), (0, 20, 70, 170, 255), (0, 110, 70, 30, 220))], axis=-1
).astype(np.uint8)  # fmt: skip


def class_color(label: int) -> np.ndarray:
    """RGB uint8 of class `label`, 1 to 254; all are different."""
    if label <= len(COLORS):
        return COLORS[label - 1]
    turn = label * 0.618034  # consecutive hues are far apart
    rgb = np.array(colorsys.hsv_to_rgb(turn % 1, 0.3 + 0.15 * (label % 3), 1 - label / 2000))
    while luminance(rgb) < 0.41:
        rgb += 0.1 * (1 - rgb)
    return np.rint(255 * rgb).astype(np.uint8)


def luminance(rgb_3: np.ndarray) -> float:
    """WCAG's relative luminance of a colour with channels from 0 to 1."""
    linear = np.where(rgb_3 <= 0.04045, rgb_3 / 12.92, ((rgb_3 + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def class_words(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """The names of the classes, background first: `names`, or 'class 1' and so on if empty."""
    return tuple(names) or ('background', *(f'class {n}' for n in range(1, num_classes)))


def class_keys(labels: np.ndarray, names: Sequence[str]) -> list[Key]:
    """The legend's entries for the classes in an array of labels; `names` as in `class_words`."""
    names = class_words(names, 256)
    return [
        (IGNORED, 'ignored') if label == IGNORE_LABEL else (class_color(label), names[label])
        for label in np.unique(labels[labels > 0]).tolist()
    ]


def difference_keys(difference_HW: np.ndarray, names: Sequence[str]) -> list[Key]:
    """The legend's entries for an array from `difference`."""
    right = class_keys(np.maximum(difference_HW, OTHER) - OTHER, names)
    errors = [(color, words) for n, (words, color) in DIFFERENCE.items() if n in difference_HW]
    return [(color, f'{words}, right') for color, words in right] + errors


def to_uint8(image_HWC: np.ndarray, low_C: np.ndarray, high_C: np.ndarray) -> np.ndarray:
    """H W C uint8 to view: uint8 stays as it is, other types map low..high to 0..255."""
    if image_HWC.dtype == np.uint8:
        return image_HWC
    share = (image_HWC.astype(np.float32) - low_C) / np.maximum(high_C - low_C, 1e-6)
    return np.rint(255 * np.clip(share, 0, 1)).astype(np.uint8)


def to_rgb(image_HWC: np.ndarray) -> np.ndarray:
    """H W 3 uint8 to view: three channels as they are, else the first one in grey.

    Types other than uint8 map their own range to 0..255.
    """
    image = image_HWC if image_HWC.shape[-1] == 3 else np.repeat(image_HWC[..., :1], 3, axis=-1)
    return to_uint8(image, image.min(axis=(0, 1)), image.max(axis=(0, 1))).copy()


def overlay(image_HWC: np.ndarray, mask_HW: np.ndarray, alpha: float = 0.45) -> np.ndarray:
    """The picture with each class tinted in its colour."""
    return _tinted(image_HWC, mask_HW, label_palette(), alpha)


def _tinted(
    image_HWC: np.ndarray, index_HW: np.ndarray, palette: np.ndarray, alpha: float
) -> np.ndarray:
    picture, inside = to_rgb(image_HWC), index_HW > 0
    mixed = (1 - alpha) * picture[inside] + alpha * palette[index_HW[inside]]
    picture[inside] = mixed.astype(np.uint8)
    return picture


def outline(image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The picture with a line along the inner edge of each class in its colour, and a black line
    next to it, so that one of the two is visible on any background.

    Between two classes only the higher one has a coloured line, as for a tumour inside an organ.
    The black line is outside, or inside if the border leaves no room. Both are one pixel wide; in
    large pictures, 1/512 of the longer side.
    """
    picture, width = to_rgb(image_HWC), max(1, round(max(mask_HW.shape) / 512))
    line = np.zeros(mask_HW.shape, bool)
    for label in np.unique(mask_HW[mask_HW > 0]):
        inner = ndimage.binary_erosion(mask_HW >= label, iterations=width)
        line |= (mask_HW == label) & ~inner

    def around(pixels_HW: np.ndarray) -> np.ndarray:
        return ndimage.binary_dilation(pixels_HW, iterations=width)

    black = around(line) & (mask_HW == 0)
    black |= around(line & ~around(black)) & ~line
    picture[black] = 0
    picture[line] = label_palette()[mask_HW[line]]
    return picture


def mask_picture(mask_HW: np.ndarray) -> np.ndarray:
    """Each class in its colour, on black."""
    return label_palette()[mask_HW]


@functools.cache
def label_palette() -> np.ndarray:
    """(256, 3) uint8: the colour of each label; background black, ignored grey."""
    palette = np.stack([(0, 0, 0), *map(class_color, range(1, 255)), IGNORED])
    return palette.astype(np.uint8)


def difference_palette() -> np.ndarray:
    """(256, 3) uint8: the colours of `difference`; no difference is black."""
    errors = [color for _, color in DIFFERENCE.values()]
    return np.concatenate([[(0, 0, 0)], errors, label_palette()[1:253]]).astype(np.uint8)


def difference(pred_HW: np.ndarray, true_HW: np.ndarray) -> np.ndarray:
    """H W uint8: a key of DIFFERENCE; for a right class OTHER + its label (at most 252); 0 if both
    are background or the truth is ignored.
    """
    found = OTHER + np.minimum(true_HW, 252).astype(np.uint8)
    found = np.where(pred_HW == true_HW, found, OTHER)
    found = np.where(true_HW == 0, FALSE, np.where(pred_HW == 0, MISSED, found))
    counted = ((pred_HW > 0) | (true_HW > 0)) & (true_HW != IGNORE_LABEL)
    return np.where(counted, found, 0).astype(np.uint8)


def difference_picture(
    image_HWC: np.ndarray, pred_HW: np.ndarray, true_HW: np.ndarray, alpha: float = 0.85
) -> np.ndarray:
    """The picture, tinted where the prediction is right, missed, false or of the wrong class."""
    return _tinted(image_HWC, difference(pred_HW, true_HW), difference_palette(), alpha)


def three_panels(image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """H 3W+gaps 3: original, predicted mask, outline on the original (the blog's figure)."""
    gap = np.full((image_HWC.shape[0], GAP, 3), 255, np.uint8)
    panels = (to_rgb(image_HWC), gap, mask_picture(mask_HW), gap, outline(image_HWC, mask_HW))
    return np.concatenate(panels, axis=1)


def volume_picture(volume: Volume, pred_DHW: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
    """The slice with the largest true objects: image, truth, prediction and difference.

    `names` are the names of all classes, background first, or empty.
    """
    pixels = [lesion_pixels(mask_HW) for mask_HW in volume.mask]
    d = int(np.argmax(pixels)) if any(pixels) else len(pixels) // 2
    image, truth, pred = volume.image[d], volume.mask[d], pred_DHW[d]
    title = volume.patient
    if len(pixels) > 1:
        which = 'most true pixels' if any(pixels) else 'no true pixels'
        title += f', slice {volume.slices[d]} ({which})'
    apart = difference(pred, truth)
    return framed(
        [('image', to_rgb(image)), ('truth', outline(image, truth)),
         ('prediction', outline(image, pred)),
         ('difference', difference_picture(image, pred, truth))],
        [*class_keys(np.stack([truth, pred]), names),
         *((color, words) for n, (words, color) in DIFFERENCE.items() if n in apart)],
        title,
    )  # fmt: skip


# Text in and around pictures.


def legend(picture_HWC: np.ndarray, mask_HW: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The RGB picture with a legend of the classes in the mask, in its upper left corner.

    `names` are the names of all classes, background first; if empty, 'class 1' and so on. There is
    no legend if it would take more than half of the width or height.
    """
    keys = class_keys(mask_HW, names)
    size = min(max(len(picture_HWC) // 24, 10), 40)
    font, row = ImageFont.load_default(size), round(1.4 * size)
    width = round(2.4 * size + max((font.getlength(words) for _, words in keys), default=0))
    height = row * len(keys) + size // 2
    if not keys or 2 * width > picture_HWC.shape[1] or 2 * height > len(picture_HWC):
        return picture_HWC
    canvas = Image.fromarray(picture_HWC)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, width, height), fill=(0, 0, 0))
    for i, (color, words) in enumerate(keys):
        _entry(draw, (size // 2, size // 3 + row * i), size, font, color, words, 'white')
    return np.array(canvas)


def framed(
    panels: Sequence[tuple[str, np.ndarray]], keys: Sequence[Key] = (), title: str = ''
) -> np.ndarray:
    """RGB pictures of one size side by side on white, with a title, captions and a legend below.

    Small pictures are enlarged by a whole number to a width of at least LEAST pixels, so that there
    is room for text; each pixel becomes a square of one colour.
    """
    height, width = panels[0][1].shape[:2]
    zoom = -(-LEAST // width)
    height, width = zoom * height, zoom * width
    size = min(max(width // 24, 12), 40)
    font, row = ImageFont.load_default(size), round(1.6 * size)
    total = len(panels) * width + (len(panels) - 1) * GAP
    lines, left = [[]], 0.0
    for color, words in keys:
        words = fitted(words, font, total - 2 * size)
        wide = 2.6 * size + font.getlength(words)
        if lines[-1] and left + wide > total:
            lines, left = [*lines, []], 0.0
        lines[-1].append((left, color, words))
        left += wide
    top = row * (1 + bool(title))
    canvas = Image.new('RGB', (total, top + height + row * (len(lines) if keys else 0)), 'white')
    draw = ImageDraw.Draw(canvas)
    if title:
        text = fitted(title, font, total - size)
        draw.text((size // 3, row / 2), text, 'black', font, anchor='lm')
    for i, (caption, picture) in enumerate(panels):
        left = i * (width + GAP)
        text = fitted(caption, font, width - size // 3)
        draw.text((left + size // 3, top - row / 2), text, 'black', font, anchor='lm')
        canvas.paste(Image.fromarray(picture.repeat(zoom, 0).repeat(zoom, 1)), (left, top))
    for n, line in enumerate(lines):
        for left, color, words in line:
            place = round(left + size / 3), round(top + height + row * n + 0.3 * size)
            _entry(draw, place, size, font, color, words, 'black')
    return np.array(canvas)


def fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, shortened to its start and end if it is wider than `width` pixels."""
    text = ''.join(c if c.isprintable() else '?' for c in text)[:500]
    kept = text
    while len(kept) > 4 and font.getlength(kept) > width:
        half = (len(kept) - 4) / 2
        kept = f'{text[: int(half + 0.5)]}...{text[len(text) - int(half) :]}'
    return kept


def _entry(draw, place: tuple[int, int], size: int, font, color, words: str, ink: str) -> None:
    """Draw one entry of a legend: a swatch and its text."""
    left, top = place
    draw.rectangle((left, top, left + size, top + size), fill=tuple(map(int, color)))
    draw.text((left + 1.4 * size, top + size / 2), words, ink, font, anchor='lm')
