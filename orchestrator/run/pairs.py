"""Training images of the Forward-Forward objective: each with its own label, and with a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hff.goodness import write_labels
from hff.randomness import derive_seed


@dataclass
class Pairs:
    """Right and wrong versions of images, (B, 2, C, H, W).

    The wrong label is a function of (seed, epoch, sample): however many workers share a batch, and wherever a run
    resumes, it is the same. It is one for all layers, for they see one image. `samples` are those of the index,
    `epoch_of` says in which epoch a step lies.
    """

    num_classes: int
    samples: int
    seed: int
    epoch_of: Callable[[int], int]
    _drawn: tuple[int, Tensor] | None = None

    def __call__(self, x: Tensor, label_B: Tensor, indices: NDArray[np.int64], step: int) -> Tensor:
        shift_B = self._shifts(self.epoch_of(step))[torch.from_numpy(indices)].to(label_B.device)
        wrong_B = (label_B + shift_B) % self.num_classes
        return write_labels(x, torch.stack([label_B, wrong_B], dim=1), self.num_classes)

    def _shifts(self, epoch: int) -> Tensor:
        """From the right label of each sample to its wrong one, 1 to C - 1; drawn anew where the epoch is another."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch))
        return self._drawn[1]

    def _draw(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "negatives", epoch))
        return torch.randint(1, self.num_classes, (self.samples,), generator=generator)
