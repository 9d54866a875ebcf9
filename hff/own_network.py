"""A network of the user's own: its bodies in order, and what they look like when they are built without memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hff.measured import measure
from hff.shapes import HeadShape, Inner, LayerShape, Shape, units_of

_SAMPLES = 2


class Architecture(ABC):
    """Bodies in order, each of which learns alone: behind it sits a head, and what it puts out goes on detached.

    A body takes (B, *input_shape) and gives features (B, D), a map (B, C, H, W) or the tokens (B, N, D) of a square
    map. Its head sees a map, or tokens, average-pooled to at most `head_grid` x `head_grid`. `depth` is the number of
    bodies: an attribute or a property, which a subclass has to have.
    """

    depth: int
    head_grid: int = 4

    @abstractmethod
    def body(self, index: int, input_shape: Shape) -> nn.Module:
        """A new body, the `index`-th from 0; `input_shape` is what one sample of its input looks like.

        Its first weights come from torch's generator, which is seeded for each body alone.
        """


def bodies_of(architecture: Architecture, input_shape: Sequence[int]) -> tuple[LayerShape, ...]:
    """Describe every body alone, for images (C, H, W). Raises ValueError for what cannot be a layer."""
    if architecture.depth < 1:
        raise ValueError(f"depth must be at least 1, got {architecture.depth}")
    shapes: list[LayerShape] = []
    with torch.device("meta"):
        x = torch.empty(_SAMPLES, *input_shape)
        for index in range(architecture.depth):
            source = tuple(x.shape[1:])
            body = architecture.body(index, source)
            if not isinstance(body, nn.Module):
                raise ValueError(f"body {index} must be a torch.nn.Module, got {type(body).__name__}")
            y, found = measure(body, x)
            _refuse_output(index, y)
            x = y
            shapes.append(
                LayerShape(
                    name=f"body{index}",
                    input=source,
                    output=found.output,
                    head_features=0,
                    parameters=found.parameters,
                    head_parameters=0,
                    buffers=found.buffers,
                    forward_flops=found.flops,
                    head_flops=0,
                    inner=Inner(found.activations),
                )
            )
    return tuple(shapes)


def _refuse_output(index: int, y: Any) -> None:
    if not isinstance(y, Tensor) or not y.is_floating_point():
        got = f"numbers of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"body {index} must put out a tensor of floating-point numbers, got {got}")
    shape = tuple(y.shape)
    if len(shape) not in (2, 3, 4) or shape[0] != _SAMPLES or 0 in shape:
        wanted = f"({_SAMPLES}, D), ({_SAMPLES}, C, H, W) or ({_SAMPLES}, N, D)"
        raise ValueError(f"body {index} must put out {wanted} for {_SAMPLES} samples, got {shape}")
    if len(shape) == 3 and math.isqrt(shape[1]) ** 2 != shape[1]:
        raise ValueError(f"body {index} must put out the tokens of a square map, got {shape[1]} of them")


def describe_own(
    architecture: Architecture,
    input_shape: Sequence[int],
    head: HeadShape | Sequence[HeadShape],
    block_size: int = 1,
    end_to_end: bool = False,
) -> tuple[LayerShape, ...]:
    """`hff.describe` for a network of the user's own: every locally trained unit, on images (C, H, W).

    Bodies are built and run on torch's meta device, which takes no memory. Raises ValueError where shapes do not fit.
    """
    bodies = bodies_of(architecture, input_shape)
    return units_of(bodies, head, architecture.head_grid, len(bodies) if end_to_end else block_size)
