"""Proof that a network is strictly local: no layer's loss reaches another layer's parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class LocalityError(Exception):
    """A layer that learns from another one's loss, or shares a parameter with it."""


class Auditable(Protocol):
    """What the audit needs: layers in order, and the loss of each with its graph kept."""

    @property
    def layers(self) -> nn.ModuleList: ...

    def local_losses(self, x: Tensor, target: Tensor) -> list[Tensor]: ...


@dataclass(frozen=True)
class LocalityReport:
    """`reached[k]` is the number of parameters of layer k that its own loss reaches."""

    layers: int
    reached: tuple[int, ...]


def audit_locality(network: Auditable, x: Tensor, target: Tensor) -> LocalityReport:
    """Differentiate every layer's loss with respect to every layer's parameters.

    `x` (B, ...) is a batch and `target` (B,) its classes; the network is not changed. Raises LocalityError, naming
    the layers, when two layers share a parameter, when the loss of one reaches a parameter of another, or when a
    layer's loss reaches nothing of its own; ValueError when the number of losses is not that of the layers.
    """
    parameters = [[p for p in layer.parameters() if p.requires_grad] for layer in network.layers]
    _refuse_sharing(parameters)
    buffers = [(b, b.clone()) for layer in network.layers for b in layer.buffers()]
    try:
        losses = network.local_losses(x, target)
        if len(losses) != len(parameters):
            raise ValueError(f"{len(parameters)} layers gave {len(losses)} losses")
        reached = [_reached(k, loss, parameters) for k, loss in enumerate(losses)]
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return LocalityReport(len(parameters), tuple(reached))


def _refuse_sharing(parameters: list[list[nn.Parameter]]) -> None:
    owner: dict[int, int] = {}
    for k, own in enumerate(parameters):
        for parameter in own:
            first = owner.setdefault(parameter.data_ptr() if parameter.numel() else id(parameter), k)
            if first != k:
                raise LocalityError(f"layers {first} and {k} share a parameter")


def _reached(k: int, loss: Tensor, parameters: list[list[nn.Parameter]]) -> int:
    count = 0
    for j, own in enumerate(parameters):
        gradients = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True) if own else ()
        found = [p for p, g in zip(own, gradients, strict=True) if g is not None]
        if j != k and found:
            raise LocalityError(f"the loss of layer {k} reaches {len(found)} parameters of layer {j}")
        if j == k:
            count = sum(math.prod(p.shape) for p in found)
    if count == 0:
        raise LocalityError(f"the loss of layer {k} reaches none of its own parameters")
    return count
