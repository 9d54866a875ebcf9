"""How long a layer's local step takes, from its shape. No torch.

seconds = arithmetic / rate + bytes moved / bandwidth, with constants of one CPU core; only their ratio matters
for a balance, and a measured profile replaces the estimate where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hff.shapes import LayerShape

FLOPS_PER_S = 140e9
BYTES_PER_S = 5.5e9
# Passes over a convolution's output that norm, ReLU, pooling and their gradients make.
PASSES = 12
# The same over everything that the modules of a larger body put out: written and read, and again backwards.
INNER_PASSES = 4
FROZEN_PASSES = 2


def layer_costs(shapes: Sequence[LayerShape], *, dtype_bytes: int = 4, end_to_end: bool = False) -> tuple[float, ...]:
    """Estimated seconds per sample of one training step of each unit.

    Forward and weight gradient cost the same arithmetic; a unit that trains end to end also needs the gradient
    with respect to its inner activations. A head needs its input gradient too: it is what the body learns from.
    """
    return tuple(_cost(shape, dtype_bytes, end_to_end) for shape in shapes)


def _cost(shape: LayerShape, dtype_bytes: int, end_to_end: bool) -> float:
    inner = shape.inner
    frozen = inner.frozen_flops if inner else 0
    # Inside a body of several modules the gradient runs through all but the lowest.
    rounds = 3 if end_to_end or inner else 2
    arithmetic = frozen + (shape.forward_flops - frozen) * rounds + 3 * shape.head_flops
    numbers = PASSES * widest_map(shape)
    if inner:
        numbers = INNER_PASSES * inner.activations + FROZEN_PASSES * inner.frozen_activations
    return arithmetic / FLOPS_PER_S + dtype_bytes * numbers / BYTES_PER_S


def widest_map(shape: LayerShape) -> int:
    """Numbers in the map that a unit works on: a pooled layer works on four times its output."""
    if len(shape.output) != 3:
        return math.prod(shape.output)
    channels = shape.output[0]
    # A 3x3 convolution keeps the size of its map; what is smaller at the end was pooled after the work.
    pooled = math.prod(shape.output[1:])
    before = math.prod(shape.input[1:]) if len(shape.input) == 3 else pooled
    return channels * (before if before <= 4 * pooled + 2 * (shape.output[1] + shape.output[2]) + 1 else pooled)
