"""Random changes of training images. The randomness of a sample is a function of seed, epoch and sample alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hff.randomness import derive_seed
from orchestrator.data.images import colour
from orchestrator.data.images.decode import Box, Crop, Pixels

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ASPECT = (3 / 4, 4 / 3)


def uniforms(seed: int, indices: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) for each sample, (B, count): splitmix64 over (seed, sample, number)."""
    numbers = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + indices.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
        z = _mixed(state)[:, None] + numbers[None, :] * _GOLDEN
        return (_mixed(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Augmenter:
    """The `data.augment` section of a job for one epoch."""

    def __init__(self, options: Mapping[str, Any], *, seed: int, epoch: int) -> None:
        self._padding = int(options.get("crop_padding", 0))
        self._flip = bool(options.get("flip", False))
        self._area = options.get("resized_crop")
        self._cutout = int(options.get("cutout", 0))
        self._colour = colour.wanted(options)
        self._jitter, self._rand_augment = options.get("color_jitter") or {}, options.get("rand_augment")
        self._seed = derive_seed(seed, "augment", epoch)

    def crops(self, indices: NDArray[np.int64]) -> list[Crop] | None:
        """The random resized crop of each sample, None when the job has none."""
        if self._area is None:
            return None
        low, high = self._area
        tables = uniforms(self._seed ^ 1, indices, 40)
        return [partial(_random_box, low=low, high=high, numbers=row) for row in tables]

    def batch(self, images: Pixels, indices: NDArray[np.int64]) -> Pixels:
        """Crop with padding, flip, change colours, cut out (B, H, W, C). May change `images` itself, to save a copy."""
        numbers = uniforms(self._seed, indices, 5)
        if self._padding:
            images = _shifted(images, self._padding, numbers)
        if self._flip:
            # By torch: numpy takes ten times as long to mirror three interleaved channels.
            for i in np.flatnonzero(numbers[:, 2] < 0.5):
                image = torch.from_numpy(images[i])
                image.copy_(image.flip(1))
        if self._colour:
            drawn = uniforms(self._seed ^ 2, indices, colour.count_numbers(self._rand_augment))
            colour.changed_images(torch.from_numpy(images), self._jitter, self._rand_augment, torch.from_numpy(drawn))
        if self._cutout:
            _cut_out(images, self._cutout, numbers)
        return images


def _shifted(images: Pixels, padding: int, numbers: NDArray[np.float64]) -> Pixels:
    """A random window of the reflected image; padding is limited to what reflection allows."""
    count, height, width, _ = images.shape
    padding = min(padding, height - 1, width - 1)
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(images, edges, mode="reflect")
    offsets = (numbers[:, :2] * (2 * padding + 1)).astype(np.int64)
    windows_BYXCHW = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    chosen_BCHW = windows_BYXCHW[np.arange(count), offsets[:, 0], offsets[:, 1]]
    return chosen_BCHW.transpose(0, 2, 3, 1)


def _cut_out(images: Pixels, side: int, numbers: NDArray[np.float64]) -> None:
    """A square of middle gray around a random point (DeVries and Taylor 2017)."""
    _, height, width, _ = images.shape
    for image, (y, x) in zip(images, numbers[:, 3:5], strict=True):
        top, left = int(y * height) - side // 2, int(x * width) - side // 2
        image[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 128


def _random_box(width: int, height: int, low: float, high: float, numbers: NDArray[np.float64]) -> Box:
    """A box with a random share of the area and a random aspect ratio (Szegedy et al. 2015)."""
    for share, aspect, y, x in numbers.reshape(10, 4):
        area = width * height * (low + (high - low) * share)
        ratio = math.exp(math.log(_ASPECT[0]) + (math.log(_ASPECT[1]) - math.log(_ASPECT[0])) * aspect)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
