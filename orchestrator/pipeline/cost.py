"""How long a layer's local step takes and how much it holds, from its shape. No torch.

seconds = arithmetic / rate + bytes moved / bandwidth, with constants of the target; a measured profile replaces
the estimate where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hff.shapes import LayerShape

# Passes over a convolution's output that norm, ReLU, pooling and their gradients make.
PASSES = 12
# The same over everything that the modules of a larger body put out: written and read, and again backwards.
INNER_PASSES = 4
FROZEN_PASSES = 2
# Numbers that an optimizer keeps per parameter.
OPTIMIZER_STATE = {"adamw": 2, "sgd": 1}


@dataclass(frozen=True)
class Target:
    """What one worker and the link between two of them can do.

    `overhead_s` is spent once per layer and step, whatever the batch. `link_bytes_per_s` holds for each direction
    of a worker, `link_latency_s` for each message and each hop of a sum over replicas.
    """

    flops_per_s: float
    bytes_per_s: float
    overhead_s: float
    link_bytes_per_s: float
    link_latency_s: float


# One core of a server, workers of one host. Only the ratios matter for a split.
CPU_CORE = Target(140e9, 5.5e9, 5e-4, 2e9, 2e-4)
# From data sheets, not measured: 40 % of an A100's bfloat16 peak, its memory, a 100 Gbit/s network.
GPU = Target(125e12, 1.5e12, 2e-4, 12.5e9, 2e-5)


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one training step of a layer: `sample_s` for each sample, `step_s` once whatever the batch."""

    sample_s: float
    step_s: float = 0.0

    def of_batch(self, samples: float) -> float:
        return samples * self.sample_s + self.step_s


def layer_costs(
    shapes: Sequence[LayerShape],
    target: Target = CPU_CORE,
    *,
    optimizer: str = "adamw",
    dtype_bytes: int = 4,
    end_to_end: bool = False,
) -> tuple[LayerCost, ...]:
    """Estimated cost of one training step of each unit.

    Forward and weight gradient cost the same arithmetic; a unit that trains end to end also needs the gradient
    with respect to its inner activations. A head needs its input gradient too: it is what the body learns from.
    The optimizer reads and writes weights, gradients and its state once per step.
    """
    return tuple(
        LayerCost(
            _sample_seconds(shape, target, dtype_bytes, end_to_end),
            target.overhead_s
            + dtype_bytes * (3 + 2 * OPTIMIZER_STATE[optimizer]) * learned(shape) / target.bytes_per_s,
        )
        for shape in shapes
    )


def learned(shape: LayerShape) -> int:
    """Parameters of a unit that have gradients."""
    return shape.parameters + shape.head_parameters - (shape.inner.frozen_parameters if shape.inner else 0)


def _sample_seconds(shape: LayerShape, target: Target, dtype_bytes: int, end_to_end: bool) -> float:
    inner = shape.inner
    frozen = inner.frozen_flops if inner else 0
    # Inside a body of several modules the gradient runs through all but the lowest.
    rounds = 3 if end_to_end or inner else 2
    arithmetic = frozen + (shape.forward_flops - frozen) * rounds + 3 * shape.head_flops
    numbers = PASSES * widest_map(shape)
    if inner:
        numbers = INNER_PASSES * inner.activations + FROZEN_PASSES * inner.frozen_activations
    numbers += PASSES * shape.head_activations
    return arithmetic / target.flops_per_s + dtype_bytes * numbers / target.bytes_per_s


def widest_map(shape: LayerShape) -> int:
    """Numbers in the map that a unit works on: a pooled layer works on four times its output."""
    if len(shape.output) != 3:
        return math.prod(shape.output)
    channels = shape.output[0]
    # A 3x3 convolution keeps the size of its map; what is smaller at the end was pooled after the work.
    pooled = math.prod(shape.output[1:])
    before = math.prod(shape.input[1:]) if len(shape.input) == 3 else pooled
    return channels * (before if before <= 4 * pooled + 2 * (shape.output[1] + shape.output[2]) + 1 else pooled)


def kept_numbers(shape: LayerShape, num_classes: int) -> int:
    """Numbers of one sample that a unit holds while it trains; when it is done, all is freed."""
    # Of a convolution: its own and its norm's output, and what goes on.
    body = 3 * widest_map(shape) if shape.inner is None else shape.inner.activations + 2 * math.prod(shape.output)
    return math.prod(shape.input) + body + 3 * shape.head_activations + shape.head_features + 2 * num_classes
