"""Random colours and RandAugment on single images, by torchvision's functions.

torchvision's own transforms draw from torch's global generator; here every number is given, so that a sample's change
is a function of seed, epoch and sample alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

JITTERS = ("brightness", "contrast", "saturation", "hue")
# Random numbers that one image needs: a factor and a place in the order for each jitter, a choice and a sign for each
# operation of RandAugment.
JITTER_NUMBERS = 2 * len(JITTERS)
OPERATION_NUMBERS = 2
_LEVELS = 30
# Each operation of RandAugment with its strength at the greatest magnitude; those of sign run both ways.
_SIGNED = {
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 150 / 331,
    "TranslateY": 150 / 331,
    "Rotate": 30.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}
OPERATIONS = ("Identity", *_SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize")


def jittered(image: Tensor, options: Mapping[str, float], numbers: Sequence[float]) -> Tensor:
    """Change the colours of (C, H, W) uint8, in random order; `numbers` are JITTER_NUMBERS in [0, 1)."""
    from torchvision.transforms.v2 import functional as f

    change = {
        "brightness": f.adjust_brightness,
        "contrast": f.adjust_contrast,
        "saturation": f.adjust_saturation,
        "hue": f.adjust_hue,
    }
    count = len(JITTERS)
    for i in sorted(range(count), key=lambda i: numbers[count + i]):
        most = options[JITTERS[i]]
        if most:
            low, high = (-most, most) if JITTERS[i] == "hue" else (max(0.0, 1 - most), 1 + most)
            image = change[JITTERS[i]](image, low + (high - low) * numbers[i])
    return image


def rand_augmented(image: Tensor, options: Mapping[str, int], numbers: Sequence[float]) -> Tensor:
    """RandAugment (Cubuk et al. 2020) of (C, H, W) uint8; `numbers` are OPERATION_NUMBERS for each operation."""
    for k in range(options["operations"]):
        choice, sign = numbers[OPERATION_NUMBERS * k : OPERATION_NUMBERS * (k + 1)]
        image = operated(image, OPERATIONS[int(choice * len(OPERATIONS))], options["magnitude"], negative=sign < 0.5)
    return image


def operated(image: Tensor, name: str, magnitude: int, *, negative: bool = False) -> Tensor:
    """One operation of RandAugment at `magnitude` of 30; `negative` for those that run both ways."""
    from torchvision.transforms.v2 import functional as f

    share = magnitude / _LEVELS
    if name in _SIGNED:
        return _signed(image, name, _SIGNED[name] * share * (-1 if negative else 1))
    plain: dict[str, Any] = {
        "Identity": lambda: image,
        "Posterize": lambda: f.posterize(image, bits=round(8 - 4 * share)),
        "Solarize": lambda: f.solarize(image, threshold=255 * (1 - share)),
        "AutoContrast": lambda: f.autocontrast(image),
        "Equalize": lambda: f.equalize(image),
    }
    changed: Tensor = plain[name]()
    return changed


def _signed(image: Tensor, name: str, strength: float) -> Tensor:
    from torchvision.transforms.v2 import functional as f

    height, width = image.shape[-2:]
    factors: dict[str, Any] = {
        "Brightness": f.adjust_brightness,
        "Color": f.adjust_saturation,
        "Contrast": f.adjust_contrast,
        "Sharpness": f.adjust_sharpness,
    }
    if name in factors:
        changed: Tensor = factors[name](image, 1 + strength)
        return changed
    if name == "Rotate":
        moved: Tensor = f.rotate(image, strength)
        return moved
    shift, shear, center = [0, 0], [0.0, 0.0], None
    axis = 0 if name.endswith("X") else 1
    if name.startswith("Translate"):
        shift[axis] = int(strength * (width, height)[axis])
    else:
        shear[axis], center = math.degrees(math.atan(strength)), [0, 0]
    moved = f.affine(image, angle=0.0, translate=shift, scale=1.0, shear=shear, center=center)
    return moved


def changed_images(
    images_BHWC: Tensor, jitter: Mapping[str, float], rand_augment: Mapping[str, int] | None, numbers: Tensor
) -> None:
    """Change every image in place: RandAugment first, with its numbers behind those of the jitter."""
    for image_HWC, row in zip(images_BHWC, numbers.tolist(), strict=True):
        image = image_HWC.permute(2, 0, 1)
        if rand_augment is not None:
            image = rand_augmented(image, rand_augment, row[JITTER_NUMBERS:])
        if any(jitter.values()):
            image = jittered(image, jitter, row[:JITTER_NUMBERS])
        image_HWC.copy_(image.permute(1, 2, 0))


def count_numbers(rand_augment: Mapping[str, int] | None) -> int:
    """Random numbers that one image needs."""
    return JITTER_NUMBERS + (0 if rand_augment is None else OPERATION_NUMBERS * rand_augment["operations"])


def wanted(options: Mapping[str, Any]) -> bool:
    """Whether `data.augment` has anything of this module."""
    return bool(options.get("rand_augment") or any((options.get("color_jitter") or {}).values()))
