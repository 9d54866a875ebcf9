"""Randomness as a function of a seed and a purpose: no global generator, the same bits everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *parts: int | str) -> int:
    """A 63-bit seed for one purpose, independent of all others.

    `parts` tell apart the uses of one purpose: a layer, an epoch, a step.
    """
    text = "\x1f".join([str(seed), purpose, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's CPU generator at `seed` and put its state back afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def seed_noise(seed: int, device: torch.device) -> None:
    """Put the generator that dropout draws from, torch's own of the device, at `seed`."""
    import torch

    on_gpu = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index or 0] if on_gpu else torch.default_generator
    generator.manual_seed(seed)
