"""What a module is and costs, seen by running it once, on the meta device for instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hff.shapes import Shape


@dataclass(frozen=True)
class Measured:
    """What a module is, per sample and forward only; `activations` counts what its innermost modules put out."""

    output: Shape
    parameters: int
    buffers: int
    flops: int
    activations: int


def measure(module: nn.Module, x: Tensor) -> tuple[Tensor, Measured]:
    """Run a module in evaluation mode, on the meta device for instance, and say what it did with `x` (B, ...)."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    activations = 0

    def note(module: nn.Module, args: Any, result: Any) -> None:
        nonlocal activations
        activations += result.numel() if isinstance(result, Tensor) else 0

    innermost = [m for m in module.modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_hook(note) for m in innermost]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = module.eval()(x)
    for handle in handles:
        handle.remove()
    samples = len(x)
    return y, Measured(
        output=tuple(getattr(y, "shape", ()))[1:],
        parameters=sum(p.numel() for p in module.parameters()),
        buffers=sum(b.numel() for b in module.buffers()),
        flops=counter.get_total_flops() // samples,
        activations=activations // samples,
    )
