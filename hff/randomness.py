"""Randomness as a function of a seed and a purpose: no global generator, the same bits everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager


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
