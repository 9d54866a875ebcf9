"""Decoded images of a small set, kept in memory from their first use on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.images.decode import Pixels


class Kept:
    """Room for `samples` images of one shape (H, W, C), uint8; memory is taken as they come. Safe between threads."""

    def __init__(self, samples: int, shape: tuple[int, int, int]) -> None:
        self._images: Pixels = np.empty((samples, *shape), dtype=np.uint8)
        self._there = np.zeros(samples, dtype=bool)

    def keep(self, indices: NDArray[np.int64], rows: Pixels) -> None:
        """Copy the images `indices` from `rows` (B, H, W, C)."""
        self._images[indices] = rows
        self._there[indices] = True

    def fill(self, rows: Pixels, indices: NDArray[np.int64]) -> bool:
        """Copy the images `indices` into `rows` (B, H, W, C); False, and nothing copied, when one is not there."""
        if not self._there[indices].all():
            return False
        np.take(self._images, indices, axis=0, out=rows)
        return True
