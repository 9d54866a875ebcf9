"""Changes of training images: functions of seed, epoch and sample, and as random as they say."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.data.images.augment import Augmenter, uniforms


def test_augmentation_is_a_function_of_seed_epoch_and_sample() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    indices = np.array([4, 9, 2, 7, 5, 0])
    augmenter = Augmenter({"crop_padding": 2, "flip": True, "cutout": 3}, seed=0, epoch=1)
    together = augmenter.batch(images, indices)
    for i in range(6):
        assert np.array_equal(augmenter.batch(images[i : i + 1], indices[i : i + 1])[0], together[i])
    other = Augmenter({"crop_padding": 2, "flip": True, "cutout": 3}, seed=0, epoch=2).batch(images, indices)
    assert not np.array_equal(other, together)
    another = Augmenter({"crop_padding": 2, "flip": True, "cutout": 3}, seed=1, epoch=1).batch(images, indices)
    assert not np.array_equal(another, together)


def test_a_padded_crop_is_a_window_of_the_reflected_image() -> None:
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    augmenter = Augmenter({"crop_padding": 2}, seed=0, epoch=0)
    padded = np.pad(image[0, :, :, 0], 2, mode="reflect")
    windows = {padded[y : y + 8, x : x + 8].tobytes(): (y, x) for y in range(5) for x in range(5)}
    seen = set()
    for i in range(300):
        seen.add(windows[augmenter.batch(image, np.array([i]))[0, :, :, 0].tobytes()])
    assert len(seen) == 25


def test_the_random_numbers_are_uniform_and_independent_of_one_another() -> None:
    numbers = uniforms(123, np.arange(20_000), 3)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(numbers.T) - np.eye(3)).max() < 0.03


def test_flips_and_cut_outs_are_those_of_numpy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    flipped = Augmenter({"flip": True}, seed=0, epoch=0).batch(images.copy(), np.arange(40))
    mirrored = [np.array_equal(found, image[:, ::-1]) for found, image in zip(flipped, images, strict=True)]
    same = [np.array_equal(found, image) for found, image in zip(flipped, images, strict=True)]
    assert 10 < sum(mirrored) < 30
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    cut = Augmenter({"cutout": 3}, seed=0, epoch=0).batch(images.copy(), np.arange(40))
    changed = (cut != images).any(axis=3).sum(axis=(1, 2))
    assert changed.max() == 9 and changed.min() > 0
    assert (cut[cut != images] == 128).all()


def test_a_cut_out_is_around_its_point_so_no_side_is_spared() -> None:
    images = np.zeros((4000, 8, 8, 1), dtype=np.uint8)
    times = (Augmenter({"cutout": 3}, seed=0, epoch=0).batch(images, np.arange(4000)) > 0).sum(axis=0)[:, :, 0]
    # In each direction a corner is hit from two of eight points, the middle from three.
    for corner in (times[0, 0], times[0, -1], times[-1, 0], times[-1, -1]):
        assert corner == pytest.approx(4000 * (2 / 8) ** 2, rel=0.2)
    assert times[3:5, 3:5] == pytest.approx(4000 * (3 / 8) ** 2, rel=0.2)


def test_a_random_crop_has_its_share_of_the_area_any_aspect_and_any_place() -> None:
    width, height, (low, high) = 120, 100, (0.25, 0.5)
    crops = Augmenter({"resized_crop": (low, high)}, seed=0, epoch=0).crops(np.arange(3000))
    assert crops is not None
    left, top, right, bottom = np.array([crop(width, height) for crop in crops]).T
    assert (left.min(), top.min(), right.max(), bottom.max()) == (0, 0, width, height)
    share, aspect = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert (share.min(), share.mean(), share.max()) == pytest.approx((low, (low + high) / 2, high), abs=0.015)
    assert (aspect.min(), np.median(aspect), aspect.max()) == pytest.approx((3 / 4, 1, 4 / 3), abs=0.03)
    middle = (left / (width - (right - left))).mean(), (top / (height - (bottom - top))).mean()
    assert middle == pytest.approx((0.5, 0.5), abs=0.03)


def test_crops_are_drawn_apart_from_flips() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8).reshape(1, 1, 2, 1), (3000, 1, 1, 1))
    augmenter = Augmenter({"flip": True, "resized_crop": (0.25, 0.5)}, seed=0, epoch=0)
    crops = augmenter.crops(np.arange(3000))
    assert crops is not None
    boxes = np.array([crop(120, 100) for crop in crops]).T
    flipped = augmenter.batch(stripes, np.arange(3000))[:, 0, 0, 0]
    assert np.abs(np.corrcoef([*boxes, flipped])[:-1, -1]).max() < 0.06


def test_an_image_that_no_crop_fits_gives_its_central_square() -> None:
    crops = Augmenter({"resized_crop": (0.9, 1.0)}, seed=0, epoch=0).crops(np.arange(5))
    assert crops is not None
    assert {crop(100, 10) for crop in crops} == {(45, 0, 55, 10)}
