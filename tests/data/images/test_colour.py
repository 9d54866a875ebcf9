"""Random colours and RandAugment: torchvision's changes, with numbers that are a function of the sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as f

from orchestrator.data.images import colour
from orchestrator.data.images.augment import Augmenter


def image(channels: int = 3) -> torch.Tensor:
    """(C, 20, 24) uint8, smooth enough that a shift or a turn is seen."""
    y, x = torch.meshgrid(torch.arange(20), torch.arange(24), indexing="ij")
    planes = [127 + 120 * torch.sin(x / (3 + c) + c) * torch.cos(y / (4 + c)) for c in range(channels)]
    return torch.stack(planes).round().to(torch.uint8)


@pytest.mark.parametrize("name", colour.OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("negative", [False, True])
def test_an_operation_is_that_of_torchvision(name: str, magnitude: int, negative: bool) -> None:
    theirs: Any = v2.RandAugment(num_ops=1, magnitude=magnitude, num_magnitude_bins=31)
    space, signed = theirs._AUGMENTATION_SPACE[name]
    strength = space(31, 20, 24)
    strength = 0.0 if strength is None else float(strength[magnitude])
    expected = theirs._apply_image_or_video_transform(
        image(), name, -strength if signed and negative else strength, interpolation=theirs.interpolation, fill={}
    )
    # torchvision's strengths are float32: a level more or less where a value lies between two.
    found = colour.operated(image(), name, magnitude, negative=negative)
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01
    assert magnitude == 0 or name == "Identity" or not torch.equal(expected, image()), "the operation shows nothing"


def test_all_operations_of_torchvision_are_there() -> None:
    assert set(colour.OPERATIONS) == set(v2.RandAugment()._AUGMENTATION_SPACE)


def test_jitter_turns_each_number_into_a_factor_and_their_order() -> None:
    options = {"brightness": 0.4, "contrast": 0.2, "saturation": 1.5, "hue": 0.1}
    # Places in the order: hue, then brightness, saturation, contrast.
    numbers = [0.0, 1.0, 0.5, 0.75, 0.3, 0.9, 0.5, 0.1]
    expected = f.adjust_hue(image(), 0.05)
    expected = f.adjust_brightness(expected, 0.6)
    expected = f.adjust_saturation(expected, 1.25)
    expected = f.adjust_contrast(expected, 1.2)
    assert torch.equal(colour.jittered(image(), options, numbers), expected)
    without_hue = f.adjust_contrast(f.adjust_saturation(f.adjust_brightness(image(), 0.6), 1.25), 1.2)
    assert torch.equal(colour.jittered(image(), {**options, "hue": 0.0}, numbers), without_hue)


OPTIONS = {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
           "rand_augment": {"operations": 2, "magnitude": 15}}  # fmt: skip


def augmented(indices: list[int], *, options: dict[str, Any] = OPTIONS, epoch: int = 0, channels: int = 3) -> Any:
    pixels = image(channels).permute(1, 2, 0).numpy()
    batch = np.repeat(pixels[None], len(indices), axis=0)
    return Augmenter(options, seed=0, epoch=epoch).batch(batch, np.array(indices))


def test_the_change_of_a_sample_depends_on_seed_epoch_and_sample_alone() -> None:
    first = augmented([5, 6, 7])
    assert np.array_equal(augmented([7])[0], first[2])
    assert np.array_equal(augmented([6, 5])[::-1], first[:2])
    assert len({a.tobytes() for a in first}) == 3
    assert not np.array_equal(augmented([5], epoch=1), first[:1])


def test_gray_images_are_changed_too() -> None:
    gray = {
        "color_jitter": {**OPTIONS["color_jitter"], "saturation": 0.0, "hue": 0.0},
        "rand_augment": OPTIONS["rand_augment"],
    }
    changed = augmented(list(range(20)), options=gray, channels=1)
    assert changed.shape == (20, 20, 24, 1)
    assert len({a.tobytes() for a in changed}) > 10


def test_every_operation_is_drawn_about_equally_often() -> None:
    from orchestrator.data.images.augment import uniforms

    numbers = uniforms(3, np.arange(7000), colour.count_numbers({"operations": 1, "magnitude": 1}))
    chosen = (numbers[:, colour.JITTER_NUMBERS] * len(colour.OPERATIONS)).astype(int)
    counts = np.bincount(chosen, minlength=len(colour.OPERATIONS))
    # 500 expected of each, with a deviation of 22.
    assert counts.min() > 400
    assert counts.max() < 600
