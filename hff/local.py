"""The local step: one layer forward, its own loss, its own gradient, its own update.

Nothing of another layer enters, and no gradient with respect to the layer's input is ever computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hff.layers import LocalLayer


@dataclass(frozen=True)
class LocalUpdate:
    """What one layer gives back: detached output (B, ...), sum of losses () and right answers () int64."""

    output: Tensor
    loss_sum: Tensor
    correct: Tensor


def local_forward_backward(
    layer: LocalLayer,
    x: Tensor,
    target: Tensor,
    *,
    count: int,
    autocast_dtype: torch.dtype | None = None,
) -> LocalUpdate:
    """Leave the gradient of sum(loss) / count in the layer's parameters.

    `x` (B, ...) and `target` (B,) int64; `count` is the number of samples of the whole batch, over all
    replicas. With `autocast_dtype` the body runs under autocast and hands on that dtype; the head does not.
    """
    with torch.autocast(x.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        y = layer(x.detach())
    if autocast_dtype is not None:
        y = y.to(autocast_dtype)
    logit_BC = layer.head(y)
    loss_sum = layer.head.loss(logit_BC, target).sum()
    torch.autograd.backward(loss_sum / count)
    correct = (logit_BC.detach().argmax(dim=1) == target).sum()
    return LocalUpdate(y.detach(), loss_sum.detach(), correct)


def local_update(layer: LocalLayer, optimizer: torch.optim.Optimizer) -> None:
    """Apply the gradients, forget them, and bring the head back to its constraints."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    layer.head.constrain_()


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
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, foreach=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, foreach=True)
    raise ValueError(f"optimizer must be adamw or sgd, got {name!r}")
