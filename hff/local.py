"""The local step: one layer forward, its own loss, its own gradient, its own update.

Nothing of another layer enters, and no gradient with respect to the layer's input is ever computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from hff.layers import LocalLayer

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)


@dataclass(frozen=True)
class LocalUpdate:
    """What one layer gives back: detached output (B, ...), sum of losses () and right answers () int64."""

    output: Tensor = field(repr=False)  # a notebook would show all of it behind each step
    loss_sum: Tensor
    correct: Tensor


def local_forward_backward(
    layer: LocalLayer,
    x: Tensor,
    target: Tensor,
    *,
    count: int,
    partner: Tensor | None = None,
    partner_weight: float = 0.0,
    micro_batches: int = 1,
    autocast_dtype: torch.dtype | None = None,
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> LocalUpdate:
    """Leave the gradient of sum(loss) / count in the layer's parameters.

    `x` (B, ...) and `target` (B,) int64; `count` is the number of samples of the whole batch, over all
    replicas. Mixed samples have a second label, `partner` (B,): their loss is that of the first, weighted
    1 - `partner_weight`, and that of the second, weighted `partner_weight`. The batch is computed in `micro_batches`
    parts, whose gradients are added: a part's activations are all that is kept for them, and a batch norm takes the
    statistics of each part. With `autocast_dtype` the body runs under autocast and hands on that dtype; the head does
    not. `phase` surrounds forward, loss and gradient by these names, for whoever times them.
    """
    labels = [target] if partner is None else [target, partner]
    parts = [
        _forward_backward(layer, x_part, own, partner_weight, count, autocast_dtype=autocast_dtype, phase=phase)
        for x_part, *own in zip(*(t.tensor_split(micro_batches) for t in (x, *labels)), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    return LocalUpdate(
        torch.cat([part.output for part in parts]),
        torch.stack([part.loss_sum for part in parts]).sum(),
        torch.stack([part.correct for part in parts]).sum(),
    )


def _forward_backward(
    layer: LocalLayer,
    x: Tensor,
    labels: Sequence[Tensor],
    partner_weight: float,
    count: int,
    *,
    autocast_dtype: torch.dtype | None,
    phase: Callable[[str], AbstractContextManager[object]],
) -> LocalUpdate:
    with phase("forward"):
        with torch.autocast(x.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            y = layer(x.detach())
        if autocast_dtype is not None:
            y = y.to(autocast_dtype)
    with phase("loss"):
        feature_BD, logit_BC = layer.judge(y)
        loss_sum = layer.head.loss(logit_BC, labels[0]).sum()
        if len(labels) > 1:
            loss_sum = (1 - partner_weight) * loss_sum + partner_weight * layer.head.loss(logit_BC, labels[1]).sum()
        over_batch = layer.head.over_batch(feature_BD, labels[0], count)
        if over_batch is not None:
            loss_sum = loss_sum + over_batch
    with phase("gradient"):
        torch.autograd.backward(loss_sum / count)
    # Of a mixed sample, the label with the greater share counts.
    heavier = labels[1] if len(labels) > 1 and partner_weight > 0.5 else labels[0]
    correct = layer.head.correct(logit_BC.detach(), heavier).sum()
    return LocalUpdate(y.detach(), loss_sum.detach(), correct)


def local_update(layer: LocalLayer, optimizer: torch.optim.Optimizer) -> None:
    """Apply the gradients, forget them, and bring the head back to its constraints."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    layer.head.constrain_()


def _eager(optimizer: type[AnyOptimizer]) -> type[AnyOptimizer]:
    """The same optimizer without torch's guards for torch.compile.

    Their first call imports torch._dynamo, which takes every worker 4 s of its start and 150 MB; nothing here is
    compiled. The guards are decorators, so what they guard is found by unwrapping; `step` needs its no_grad again.
    """
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in ("add_param_group", "zero_grad")}
    methods["step"] = torch.no_grad()(inspect.unwrap(optimizer.step))
    return cast(type[AnyOptimizer], type(optimizer.__name__, (optimizer,), methods))


_AdamW, _SGD = _eager(torch.optim.AdamW), _eager(torch.optim.SGD)


def make_optimizer(
    layer: LocalLayer,
    name: str,
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """An optimizer for one layer alone.

    Weight decay applies to matrices and kernels of the body and to a linear head's matrix; never to norms,
    biases, scales and prototypes. Raises ValueError for an unknown name.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for key, parameter in layer.named_parameters():
        if parameter.requires_grad:
            free = parameter.dim() < 2 or key == "head.prototypes"
            (exempt if free else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Fused: one pass over the numbers in place of ten, a quarter of the time for heads of millions of them.
    on_cpu = all(parameter.device.type == "cpu" for parameter in layer.parameters())
    one_pass: dict[str, bool] = {"fused": True} if on_cpu else {"foreach": True}
    if name == "adamw":
        return _AdamW(groups, lr=lr, betas=betas, **one_pass)
    if name == "sgd":
        return _SGD(groups, lr=lr, momentum=momentum, **one_pass)
    raise ValueError(f"optimizer must be adamw or sgd, got {name!r}")
