"""Components by hand and by a flood fill, thresholds against the likeliest class."""

import numpy as np
import pytest

from pspnet_jax.inference import postprocess

LABELS = np.array(
    [[1, 1, 0, 0, 2, 2],
     [0, 0, 1, 0, 0, 2],
     [0, 0, 0, 0, 0, 0],
     [1, 0, 2, 0, 0, 1]], np.uint8
)[None]  # fmt: skip


def test_small_parts_go_class_by_class_and_corners_connect():
    largest = LABELS.copy()
    largest[0, 3] = 0
    kept = postprocess.clean(LABELS, largest_component=True)
    np.testing.assert_array_equal(kept, largest)
    np.testing.assert_array_equal(postprocess.clean(LABELS, min_size=3), largest)
    assert not postprocess.clean(LABELS, min_size=4).any()
    assert not postprocess.clean(LABELS, largest_component=True, min_size=4).any()


@pytest.mark.parametrize('options', [{}, {'min_size': 0}, {'min_size': 1}])
def test_nothing_asked_for_is_nothing_done(options):
    np.testing.assert_array_equal(postprocess.clean(LABELS, **options), LABELS)


def flood(labels, start):
    """Every voxel that is reached from one over faces, edges and corners."""
    reached, todo = {start}, [start]
    while todo:
        place = todo.pop()
        for step in np.ndindex(3, 3, 3):
            near = tuple(int(a + b - 1) for a, b in zip(place, step, strict=True))
            inside = all(0 <= n < size for n, size in zip(near, labels.shape, strict=True))
            if inside and near not in reached and labels[near] == labels[start]:
                reached.add(near)
                todo.append(near)
    return reached


def test_it_is_what_a_flood_fill_says(rng):
    labels = rng.choice(3, (3, 9, 9), p=(0.85, 0.1, 0.05)).astype(np.uint8)
    kept = postprocess.clean(labels, min_size=3)
    parts = {place: flood(labels, place) for place in map(tuple, np.argwhere(labels).tolist())}
    for place in np.ndindex(labels.shape):
        stays = place in parts and len(parts[place]) >= 3
        assert kept[place] == (labels[place] if stays else 0)
    assert 0 < kept.astype(bool).sum() < labels.astype(bool).sum()
    one = postprocess.clean(labels, largest_component=True)
    for label in (1, 2):
        sizes = [len(part) for place, part in parts.items() if labels[place] == label]
        assert (one == label).sum() == max(sizes)


def test_the_likeliest_class_or_the_one_above_the_threshold(rng):
    prob = rng.random((5, 4, 2)).astype(np.float32)
    prob /= prob.sum(-1, keepdims=True)
    np.testing.assert_array_equal(postprocess.to_labels(prob), prob[..., 1] > prob[..., 0])
    np.testing.assert_array_equal(postprocess.to_labels(prob, 0.5), postprocess.to_labels(prob))
    np.testing.assert_array_equal(postprocess.to_labels(prob, 0.8), prob[..., 1] > 0.8)
    assert postprocess.to_labels(prob).dtype == np.uint8
    three = np.eye(3, dtype=np.float32)[[2, 0, 1]]
    assert postprocess.to_labels(three).tolist() == [2, 0, 1]
