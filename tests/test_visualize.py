"""Pictures: the colour of every pixel, and lines that are seen on any background."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFont
from scipy import ndimage

from pspnet_jax.data import formats, masks
from pspnet_jax.data.volumes import IGNORE_LABEL, Volume
from pspnet_jax.evaluation import visualize
from pspnet_jax.prediction import results
from tests.test_charts import BLIND, lab, linear

BLACK = (0, 0, 0)


def hexes(colors):
    return [f'#{r:02x}{g:02x}{b:02x}' for r, g, b in colors]


def luminance(colors_N3):
    """WCAG 2's, of uint8 colours, written once more."""
    share = np.asarray(colors_N3) / 255
    low, high = share / 12.92, ((share + 0.055) / 1.055) ** 2.4
    return np.where(share <= 0.04045, low, high) @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    brighter, darker = np.maximum(one, other), np.minimum(one, other)
    return (brighter + 0.05) / (darker + 0.05)


def touched(pixels_HW):
    """These and the eight around each."""
    return ndimage.binary_dilation(pixels_HW, np.ones((3, 3)))


# Colours.


def test_no_two_labels_have_one_colour():
    """Else a palette says of two classes that they are the same, and masks can't be read by it."""
    palette = visualize.label_palette()
    assert palette.shape == (256, 3)
    assert len(np.unique(palette, axis=0)) == 256
    for label in (1, 7, 8, 254):
        np.testing.assert_array_equal(palette[label], visualize.class_color(label))


@pytest.mark.parametrize('sight', [np.eye(3), *BLIND], ids=['all', 'protan', 'deutan', 'tritan'])
def test_classes_and_errors_are_told_apart_by_colour_blind_eyes(sight):
    errors = [color for _, color in visualize.DIFFERENCE.values()]
    classes = visualize.COLORS.tolist()
    seen = lab(linear(hexes([*errors, BLACK, *classes])) @ sight.T)
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    apart[np.diag_indices(len(apart))] = np.inf
    assert apart[:3].min() > 25  # an error, from all else
    assert apart[3:, 3:].min() > 15  # 2.3 is just noticeable


@pytest.mark.parametrize('label', [1, 2, 7, 8, 100, 254])
def test_one_of_two_lines_is_seen_on_any_grey(label):
    """WCAG 2 asks 3:1 of graphics. On a square with room, on one pixel, and at the border."""
    shapes = np.zeros((3, 24, 24), np.uint8)
    shapes[0, 6:18, 6:18] = shapes[1, 11, 11] = shapes[2, :6, :24] = label
    for mask, grey in itertools.product(shapes, range(0, 256, 3)):
        picture = visualize.outline(np.full((24, 24, 3), grey, np.uint8), mask)
        inside = mask == label
        edge = inside & ~ndimage.binary_erosion(inside)
        assert (picture[edge] == visualize.class_color(label)).all()
        far = ~ndimage.binary_dilation(edge)
        assert (picture[far] == grey).all()
        seen = contrast(luminance(picture), luminance([grey] * 3)) >= 3
        assert touched(seen)[edge].all(), grey  # it itself, or the line beside it


def test_lines_between_two_classes_are_seen_too():
    mask = np.ones((30, 30), np.uint8)
    mask[:, 15:] = 2
    for grey in (0, 60, 100, 128, 190, 255):
        picture = visualize.outline(np.full((30, 30, 3), grey, np.uint8), mask)
        seen = contrast(luminance(picture), luminance([grey] * 3)) >= 3
        assert touched(seen)[:, 14:16].all()
        assert (picture[15, 14] == 0).all()
        assert (picture[15, 15] == visualize.class_color(2)).all()  # the higher one alone
        assert (picture[0, 5] == visualize.class_color(1)).all()


def test_lines_of_large_pictures_are_wider():
    mask = np.zeros((2048, 40), np.uint8)
    mask[1000:1030, 5:35] = 1
    picture = visualize.outline(np.full((2048, 40, 3), 100, np.uint8), mask)
    orange = (picture == visualize.class_color(1)).all(-1)
    assert np.flatnonzero(orange[:, 20]).tolist() == [*range(1000, 1004), *range(1026, 1030)]
    assert (picture[996:1000, 20] == 0).all()


def test_a_class_has_one_colour_in_every_picture():
    image, mask = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), np.uint8)
    mask[4:16, 4:16] = 5
    color = visualize.class_color(5)
    assert (visualize.overlay(image, mask, alpha=1)[mask == 5] == color).all()
    assert (visualize.outline(image, mask)[4, 4] == color).all()
    assert (visualize.mask_picture(mask)[mask == 5] == color).all()
    assert (visualize.label_palette()[5] == color).all()
    apart = visualize.difference_picture(image, mask, mask, alpha=1)
    assert (apart[mask == 5] == color).all()


# Differences.

# {(truth, prediction): what it is}, by hand.
PAIRS = {
    (0, 0): 'nothing', (0, 1): 'false', (0, 2): 'false',
    (1, 0): 'missed', (1, 1): 'class 1', (1, 2): 'wrong class',
    (2, 0): 'missed', (2, 1): 'wrong class', (2, 2): 'class 2',
    (IGNORE_LABEL, 0): 'nothing', (IGNORE_LABEL, 1): 'nothing', (IGNORE_LABEL, 2): 'nothing',
}  # fmt: skip
SHOWN = {
    'nothing': BLACK, 'missed': (0, 105, 165), 'false': (165, 60, 0),
    'wrong class': (165, 0, 255), 'class 1': (230, 159, 0), 'class 2': (86, 180, 233),
}  # fmt: skip


def test_every_pixel_of_a_difference_has_the_colour_of_its_pair(rng):
    truth = rng.choice([0, 1, 2, IGNORE_LABEL], (40, 50)).astype(np.uint8)
    pred = rng.integers(0, 3, truth.shape).astype(np.uint8)
    assert {*zip(truth.ravel().tolist(), pred.ravel().tolist(), strict=True)} == set(PAIRS)
    picture = visualize.difference_picture(np.zeros((40, 50, 3), np.uint8), pred, truth, alpha=1)
    for (t, p), kind in PAIRS.items():
        assert (picture[(truth == t) & (pred == p)] == SHOWN[kind]).all(), (t, p)


def test_the_legend_of_a_difference_names_each_colour_that_is_there(rng):
    truth = np.array([[0, 1, 2, 2, 1]], np.uint8)
    pred = np.array([[1, 0, 1, 2, 0]], np.uint8)
    keys = visualize.difference_keys(visualize.difference(pred, truth), ('none', 'oedema', 'core'))
    found = {words: tuple(map(int, color)) for color, words in keys}
    assert found == {
        'core, right': SHOWN['class 2'],
        'missed': SHOWN['missed'],
        'false': SHOWN['false'],
        'wrong class': SHOWN['wrong class'],
    }
    assert visualize.difference_keys(np.zeros((2, 2), np.uint8), ()) == []


# Captions and legends.


def colors_of(picture):
    return {tuple(color) for color in picture.reshape(-1, 3).tolist()}


def test_panels_stand_in_the_frame_pixel_by_pixel(rng):
    panels = [rng.integers(0, 255, (90, 200, 3), np.uint8) for _ in range(3)]
    keys = [((1, 2, 3), 'oedema'), ((9, 8, 7), 'core')]
    picture = visualize.framed(list(zip('abc', panels, strict=True)), keys, 'case 7')
    assert picture.shape[1] == 3 * 200 + 2 * visualize.GAP
    rows = [r for r in range(len(picture) - 90) if (picture[r : r + 90, :200] == panels[0]).all()]
    (top,) = rows
    for i, panel in enumerate(panels):
        left = i * (200 + visualize.GAP)
        np.testing.assert_array_equal(picture[top : top + 90, left : left + 200], panel)
    assert {(1, 2, 3), (9, 8, 7)} <= colors_of(picture[top + 90 :])
    assert (picture[: top // 2] == 0).all(-1).any()  # the title
    assert (picture[top // 2 : top] == 0).all(-1).any()  # the captions


def test_small_panels_are_enlarged_for_their_words():
    small = np.zeros((8, 8, 3), np.uint8)
    small[2, 3] = 7, 0, 0
    picture = visualize.framed([('image', small)])
    assert picture.shape[1] == visualize.LEAST
    zoom = visualize.LEAST // 8
    assert (picture == (7, 0, 0)).all(-1).sum() == zoom**2


def test_a_legend_takes_as_many_lines_as_it_needs():
    panel = [('image', np.zeros((50, 200, 3), np.uint8))]
    keys = [((n, 0, 99), f'class number {n}') for n in range(9)]
    picture = visualize.framed(panel, keys)
    assert {color for color, _ in keys} <= colors_of(picture)
    long = visualize.framed([('a' * 900, panel[0][1])], [((1, 2, 3), 'w' * 900)], '\x1b' * 900)
    assert long.shape[1] == 200


@pytest.mark.parametrize('text', ['', 'abc', 'patient_1234567890_left', 'w' * 400])
def test_a_name_is_shortened_in_its_middle(text):
    font = ImageFont.load_default(12)
    shown = visualize.fitted(text, font, 80)
    assert font.getlength(shown) <= 80
    assert shown == text or (shown[0] == text[0] and '...' in shown and len(shown) < len(text))


def test_the_picture_of_a_volume_shows_where_it_is_wrong():
    mask = np.zeros((3, 200, 200), np.uint8)
    mask[1, 50:100, 50:100] = 1
    mask[1, 120:160, 50:100] = 2
    pred = np.zeros_like(mask)
    pred[1, 60:110, 50:100] = 1
    pred[1, 120:160, 50:80] = 1
    volume = Volume('case', np.zeros((3, 200, 200, 1), np.uint8), mask, np.arange(3), None)
    picture = visualize.volume_picture(volume, pred, ('background', 'oedema', 'core'))
    assert picture.shape[1] == 4 * 200 + 3 * visualize.GAP
    swatches = colors_of(picture[-15:])
    for kind in ('missed', 'false', 'wrong class', 'class 1', 'class 2'):
        assert SHOWN[kind] in swatches, kind
    without = visualize.volume_picture(volume, mask)
    assert SHOWN['missed'] not in colors_of(without[-15:])


# Masks.


@pytest.mark.parametrize('classes', [3, 21, 255])
def test_a_palette_mask_is_read_back_as_its_labels(tmp_path, rng, classes):
    """By Pillow, as a mask, and as masks of a training, of which no two hold the same classes."""
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(tmp_path / 'image.png')
    like = formats.read(tmp_path / 'image.png')
    labels = [rng.integers(0, classes, (1, 30, 40)).astype(np.uint8) for _ in range(3)]
    labels.append(np.zeros_like(labels[0]))
    labels.append(np.where(labels[0] == classes - 1, classes - 1, 0).astype(np.uint8))
    paths = [tmp_path / f'{n}.png' for n in range(len(labels))]
    for path, each in zip(paths, labels, strict=True):
        formats.write_labels(path, each, like, visualize.label_palette())
        with Image.open(path) as picture:
            assert picture.mode == 'P'
            np.testing.assert_array_equal(np.array(picture), each[0])
            np.testing.assert_array_equal(
                np.array(picture.convert('RGB')), visualize.mask_picture(each[0])
            )
        np.testing.assert_array_equal(formats.read_labels(path), each)
    code = masks.understand({path: masks.look(path) for path in paths}, num_classes=classes)
    assert not code.by_color
    for path, each in zip(paths, labels, strict=True):
        np.testing.assert_array_equal(masks.read_classes(path, like, code), each)


def test_a_folder_of_slices_gets_palette_masks_and_deep_labels_none(tmp_path, rng):
    (tmp_path / 'in').mkdir()
    for n in range(2):
        Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / 'in' / f'{n}.png')
    like = formats.read(tmp_path / 'in')
    labels = rng.integers(0, 4, (2, 9, 8)).astype(np.uint8)
    formats.write_labels(tmp_path / 'out', labels, like, visualize.label_palette())
    for n in range(2):
        with Image.open(tmp_path / 'out' / f'{n}.png') as picture:
            assert picture.mode == 'P'
            np.testing.assert_array_equal(np.array(picture), labels[n])
    formats.write_labels(
        tmp_path / 'deep', labels + np.uint16(300), like, visualize.label_palette()
    )
    with Image.open(tmp_path / 'deep' / '0.png') as picture:
        np.testing.assert_array_equal(np.array(picture), labels[0] + np.uint16(300))


@pytest.mark.parametrize(('classes', 'mode'), [(2, 'L'), (3, 'P')])
def test_masks_of_two_classes_stay_black_and_white(tmp_path, rng, classes, mode):
    from pspnet_jax.data.volumes import measure_intensity
    from tests.conftest import tiny_config

    Image.fromarray(rng.integers(0, 255, (30, 40), np.uint8)).save(tmp_path / 'a.png')
    picture = formats.read(tmp_path / 'a.png')
    labels = rng.integers(0, classes, (1, 30, 40)).astype(np.uint8)
    config = tiny_config(**{'model.num_classes': classes})
    results._write(
        tmp_path / 'a', picture, picture.image, measure_intensity(picture.image), labels, None,
        save=('mask', 'panels', 'overlay', 'outline'), config=config,
    )  # fmt: skip
    with Image.open(tmp_path / 'a_mask.png') as mask:
        assert mask.mode == mode
        np.testing.assert_array_equal(np.array(mask), labels[0] * (255 if classes == 2 else 1))
    for kind in ('overlay', 'outline'):  # lie on the picture, pixel by pixel
        assert Image.open(tmp_path / f'a_{kind}.png').size == (40, 30)
    panels = np.array(Image.open(tmp_path / 'a_panels.png'))
    assert panels.shape[1] == 3 * 160 + 2 * visualize.GAP
