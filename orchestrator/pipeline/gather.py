"""All replicas of a stage as one batch: norms and terms over the batch see the samples of every one."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from hff.similarity import SimilarityTerm
from orchestrator.pipeline import sync_norm


class GatherReplicas:
    """Features and labels of all replicas of `group` in the order of the samples; those of the others are constants."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        # Seconds that the others were waited for since they were asked for.
        self.waited_s = 0.0

    def __call__(self, z_BD: Tensor, target_B: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
        """z_ND and target_N (N,) of all `count` samples or fewer, and the row of the first own one.

        Replicas hold unequal shares, so each sends as many rows as the largest may have. Labels are one more column,
        which saves a message.
        """
        room = -(-count // self.group.size())
        own = torch.cat([z_BD.detach(), target_B[:, None].to(z_BD.dtype)], dim=1)
        own = F.pad(own, (0, 0, 0, room - len(own)), value=-1.0)
        parts = [torch.empty_like(own) for _ in range(self.group.size())]
        began = time.perf_counter()
        dist.all_gather(parts, own, group=self.group)
        self.waited_s += time.perf_counter() - began
        filled = [part[part[:, -1] >= 0] for part in parts]
        rank = self.group.rank()
        z_ND = torch.cat([*(p[:, :-1] for p in filled[:rank]), z_BD, *(p[:, :-1] for p in filled[rank + 1 :])])
        return z_ND, torch.cat([p[:, -1] for p in filled]).to(target_B.dtype), sum(map(len, filled[:rank]))


def synchronise(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Let the batch norms and the terms over the batch inside `module` see all replicas of `group`, in place."""
    sync_norm.synchronise_norms(module, group)
    for term in module.modules():
        if isinstance(term, SimilarityTerm):
            term.gather = GatherReplicas(group)


def take_waited(module: nn.Module) -> float:
    """Seconds that the parts of `module` waited for other replicas since the last call."""
    waited = sync_norm.take_waited(module)
    for term in module.modules():
        if isinstance(term, SimilarityTerm) and isinstance(term.gather, GatherReplicas):
            waited, term.gather.waited_s = waited + term.gather.waited_s, 0.0
    return waited
