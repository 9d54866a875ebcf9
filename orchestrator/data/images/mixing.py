"""Mixup and cutmix: every image of a global batch mixed with the one before it, the first with the last.

How a batch is mixed is a function of seed and step, and whose partner an image is follows from the order of samples, so
that neither depends on the replicas that share the batch. A partner that another replica has is decoded here too: one
image for each batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hff.randomness import derive_seed


@dataclass(frozen=True)
class Mix:
    """How one replica's images of one batch are mixed.

    `weight` is the share of an image that is its own; with cutmix, `box` (left, top, right, bottom, as shares of the
    sides) comes from the partner. `before` is the sample whose image is the first one's partner.
    """

    weight: float
    box: tuple[float, float, float, float] | None
    before: int


def drawn(options: Mapping[str, Any], *, seed: int, step: int, before: int) -> Mix | None:
    """The mix of a step by `data.augment`; None where the job has none.

    The share is drawn from Beta(alpha, alpha) (mixup: Zhang et al. 2018), the box of cutmix around a uniform point
    with that share of the area left outside (Yun et al. 2019); where both are wanted, a coin decides.
    """
    mixup, cutmix = options.get("mixup", 0.0), options.get("cutmix", 0.0)
    if not mixup and not cutmix:
        return None
    random = np.random.Generator(np.random.PCG64(derive_seed(seed, "mix", step)))
    coin, x, y = random.random(3)
    if not cutmix or (mixup and coin < 0.5):
        return Mix(float(random.beta(mixup, mixup)), None, before)
    half = 0.5 * math.sqrt(1 - random.beta(cutmix, cutmix))
    return Mix(1.0, (max(0.0, x - half), max(0.0, y - half), min(1.0, x + half), min(1.0, y + half)), before)


def mixed(own_BHWC: Tensor, other_BHWC: Tensor, mix: Mix) -> tuple[Tensor, float]:
    """Images uint8 of a batch and their partners' as one, rounded to whole levels, and the weight of the own labels."""
    if mix.box is None:
        blend = torch.lerp(other_BHWC.float(), own_BHWC.float(), mix.weight)
        return blend.round_().to(torch.uint8), mix.weight
    _, height, width, _ = own_BHWC.shape
    left, top, right, bottom = (
        round(share * side) for share, side in zip(mix.box, (width, height, width, height), strict=True)
    )
    result = own_BHWC.clone()
    result[:, top:bottom, left:right] = other_BHWC[:, top:bottom, left:right]
    return result, 1 - (right - left) * (bottom - top) / (width * height)


def places(planned: NDArray[np.int64], there: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """Rows of the images and of their partners in what was decoded of `planned`, whose first is a partner alone.

    `there` says which of `planned` were decoded. An image whose partner is missing has itself.
    """
    rows = np.cumsum(there) - 1
    own = np.flatnonzero(there[1:]) + 1
    partner = np.where(there[own - 1], own - 1, own)
    return torch.from_numpy(rows[own]), torch.from_numpy(rows[partner])
