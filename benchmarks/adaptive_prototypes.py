"""A prototype head that finds out how many prototypes each class needs: it splits the busy and prunes the idle.

An experiment, kept for its measurement (`python -m benchmarks.levers --adaptive`); not part of the method.

Shape letters: B batch, C classes, M places for prototypes, D features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hff.objectives import PrototypeHead
from hff.sphere import normalise


class AdaptivePrototypes(PrototypeHead):
    """`start` prototypes per class, up to `most`; every `every` steps, up to step `until`, numbers follow usage.

    A prototype is used by the samples of its class that are nearest to it. With n of a class, one that gets less than
    `idle` / n of them goes; the busiest, if it gets more than `busy` / n, is split in two. One replica only.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        grid: int,
        start: int = 4,
        most: int = 8,
        every: int = 50,
        until: int = 10**9,
        idle: float = 0.5,
        busy: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(features, num_classes, grid=grid, prototypes_per_class=most, **options)
        self.every, self.until, self.idle, self.busy = every, until, idle, busy
        self.register_buffer("active_CM", torch.arange(most).expand(num_classes, most) < start)
        self.register_buffer("used_CM", torch.zeros(num_classes, most))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._cos_BCM: Tensor | None = None

    def logits(self, feature_BD: Tensor) -> Tensor:
        proto_CMD = self.unit_prototypes()
        cos_BCM = (normalise(feature_BD) @ proto_CMD.flatten(0, 1).T).view(-1, *proto_CMD.shape[:2])
        cos_BCM = cos_BCM.masked_fill(~self.active_CM, -torch.inf)
        self._cos_BCM = cos_BCM.detach() if self.training else None
        mean_BC = torch.logsumexp(self.sharpness * cos_BCM, dim=2) - self.active_CM.sum(dim=1).log()
        return self.scale * mean_BC / self.sharpness

    def loss(self, logit_BC: Tensor, target_B: Tensor) -> Tensor:
        if self._cos_BCM is not None:
            nearest_B = self._cos_BCM[torch.arange(len(target_B)), target_B].argmax(dim=1)
            self.used_CM.index_put_((target_B, nearest_B), torch.ones(len(target_B)), accumulate=True)
        return super().loss(logit_BC, target_B)

    @torch.no_grad()
    def constrain_(self) -> None:
        super().constrain_()
        if not hasattr(self, "steps"):
            return
        self.steps += 1
        if int(self.steps) % self.every == 0 and int(self.steps) <= self.until:
            for c in range(self.num_classes):
                self._follow_usage(c)
            self.used_CM.zero_()

    def _follow_usage(self, c: int) -> None:
        active_M, used_M = self.active_CM[c], self.used_CM[c]
        count, total = int(active_M.sum()), float(used_M.sum())
        if total == 0:
            return
        share_M = used_M / total * count
        busiest = int(share_M.argmax())
        idle_M = active_M & (share_M < self.idle)
        active_M &= ~idle_M
        free = torch.nonzero(~active_M & ~idle_M)
        if share_M[busiest] > self.busy and len(free):
            place = int(free[0])
            generator = torch.Generator().manual_seed(int(self.steps) * self.num_classes + c)
            noise_D = torch.randn(self.features, generator=generator) * 0.1 / math.sqrt(self.features)
            self.prototypes[c, place] = F.normalize(self.prototypes[c, busiest] + noise_D, dim=0)
            active_M[place] = True
