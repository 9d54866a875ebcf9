"""Batch normalisation over all replicas of a stage, on CPU and GPU (torch's own refuses CPU tensors)."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hff.layers import Frozen
from orchestrator.errors import JobError


class _SumOverReplicas(torch.autograd.Function):
    """A sum over all replicas; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: SyncBatchNorm) -> Tensor:
        ctx.norm = norm
        return norm.summed(x.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        norm: SyncBatchNorm = ctx.norm
        return norm.summed(gradients[0].contiguous().clone()), None


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d, 2d or 3d whose statistics are those of the whole batch of a stage.

    Same parameters, buffers and names as the norm that it replaces, so checkpoints do not know the difference.
    Mean first, then the centred square: as exact as one process up to the order of sums.
    """

    group: dist.ProcessGroup
    drop: nn.Module | None
    act: nn.Module | None
    # Seconds that its sums have taken since they were asked for.
    waited_s: float = 0.0

    @classmethod
    def of(cls, norm: _BatchNorm, group: dist.ProcessGroup) -> SyncBatchNorm:
        """Take over the very parameters and buffers of `norm`."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made.weight, made.bias = norm.weight, norm.bias
        made.running_mean, made.running_var = norm.running_mean, norm.running_var
        made.num_batches_tracked = norm.num_batches_tracked
        made.group = group
        # timm's norms have dropout and activation inside.
        made.drop, made.act = (getattr(norm, part, None) for part in ("drop", "act"))
        return made

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C) or (B, C, ...), got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        y = self._normalised(input) if self.training else super().forward(input)
        for after in (self.drop, self.act):
            y = y if after is None else after(y)
        return y

    def _normalised(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        x = input if input.dtype == torch.float64 else input.float()
        over = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        # Filled on the device: a copy from the host would wait for it.
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = self._over_replicas(torch.cat([x.sum(over), count]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        centred = x - mean.view(shape)
        variance = self._over_replicas((centred * centred).sum(over)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            y = centred * (self.weight * scale).view(shape) + self.bias.view(shape)
        else:
            y = centred * scale.view(shape)
        return y.to(input.dtype)

    def _over_replicas(self, x: Tensor) -> Tensor:
        total: Tensor = _SumOverReplicas.apply(x, self)
        return total

    def summed(self, x: Tensor) -> Tensor:
        """`x`, changed in place to the sum over all replicas."""
        began = time.perf_counter()
        dist.all_reduce(x, group=self.group)
        self.waited_s += time.perf_counter() - began
        return x

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        # Without one: the mean of all batches so far, as torch does it.
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased, momentum)


def synchronise_norms(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Replace every batch norm inside `module` that learns by one over the replicas of `group`, in place.

    Raises JobError for one that cannot be divided among replicas.
    """
    _replace(module, group, {})


def _replace(module: nn.Module, group: dist.ProcessGroup, made: dict[nn.Module, SyncBatchNorm]) -> None:
    if isinstance(module, Frozen):
        return
    # Not named_children, which passes over the second name of one norm.
    for name, child in list(module._modules.items()):
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            if child not in made:
                _refuse_undivided(child)
                made[child] = SyncBatchNorm.of(child, group)
            setattr(module, name, made[child])
        elif child is not None:
            _replace(child, group, made)


def _refuse_undivided(norm: _BatchNorm) -> None:
    remedy = "use another norm, or one replica for each stage (cluster.stages: cluster.workers)"
    kind = type(norm).__name__
    if not norm.track_running_stats:
        raise JobError(f"model: {kind} with track_running_stats=False has nothing to evaluate with; {remedy}")
    timms = hasattr(norm, "drop") and hasattr(norm, "act")
    if type(norm).forward is not _BatchNorm.forward and not timms:
        raise JobError(f"model: {kind} is a batch norm with a forward of its own, unknown to replicas; {remedy}")


def take_waited(module: nn.Module) -> float:
    """Seconds that the norms inside `module` waited for their sums since the last call."""
    waited = 0.0
    for norm in module.modules():
        if isinstance(norm, SyncBatchNorm):
            waited, norm.waited_s = waited + norm.waited_s, 0.0
    return waited
