"""A frozen trunk by its features: what is kept of it, and the same units fed with what was kept.

The features of an image are, side by side, what each head at the trunk sees of it (or the layers on top of it):
one part per unit that holds stages of the trunk. A unit drops the part of the unit before, reads its own, and hands
on the rest; its weights, the trunk's too, are saved and hashed as ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hff.layers import Frozen, LocalLayer
from hff.objectives import pool_to_grid
from hff.shapes import LayerShape, head_features
from orchestrator.transfer.backbone import trunk_shape
from orchestrator.transfer.units import plan_units


def divided(layer: LocalLayer) -> tuple[tuple[Frozen, ...], tuple[nn.Module, ...]]:
    """The frozen stages at the beginning of a unit's body, and what learns behind them."""
    parts = list(layer.body.children()) if isinstance(layer.body, nn.Sequential) else [layer.body]
    count = next((i for i, part in enumerate(parts) if not isinstance(part, Frozen)), len(parts))
    return tuple(part for part in parts[:count] if isinstance(part, Frozen)), tuple(parts[count:])


def trunk_units(layers: Sequence[LocalLayer]) -> list[LocalLayer]:
    """The units that hold stages of the frozen trunk: the first ones, up to one with layers on top."""
    found = []
    for layer in layers:
        frozen, rest = divided(layer)
        if frozen:
            found.append(layer)
        if rest:
            break
    return found


@torch.no_grad()
def trunk_parts(units: Sequence[LocalLayer], x: Tensor) -> list[Tensor]:
    """What heads see of images (B, C, H, W): (B, features) for each of `trunk_units`."""
    parts = []
    for unit in units:
        for stage in divided(unit)[0]:
            x = stage(x)
        part = pool_to_grid(x, unit.head.grid, unit.head.prefix_tokens)
        parts.append(part if part.dtype == torch.float64 else part.float())
    return parts


def trunk_sha256(units: Sequence[LocalLayer]) -> str:
    """Hash of all parameters and buffers of the frozen stages, with their names and shapes."""
    digest = hashlib.sha256()
    for unit in units:
        for stage in divided(unit)[0]:
            for name, tensor in sorted(stage.state_dict().items()):
                digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(b"/")
    return digest.hexdigest()


class FedUnit(LocalLayer):
    """A unit of the trunk that gets features (B, skip + own + rest) and hands on its own and the rest."""

    def __init__(self, unit: LocalLayer, skip: int) -> None:
        super().__init__(unit.name, unit.body, unit.head)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        """The features from this unit's own on, (B, own + rest); behind layers on top, what these make of them."""
        x = x[:, self.skip :]
        for module in divided(self)[1]:
            x = module(x)
        return x

    def judge(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.head.judge(y[:, : self.head.features])


def fed(layers: Sequence[LocalLayer], first: int, parts: Sequence[int]) -> list[LocalLayer]:
    """Units `first`, `first` + 1, ... of a network, those of the trunk fed with features of `parts` numbers each."""
    skips = (0, *parts[:-1])
    return [
        FedUnit(layer, skips[number]) if number < len(parts) else layer for number, layer in enumerate(layers, first)
    ]


def cached_parts(model: dict[str, Any], image_size: int, *, end_to_end: bool) -> tuple[int, ...]:
    """How many numbers each unit of a frozen trunk sees, from the bottom."""
    trunk = trunk_shape(model["backbone"], image_size)
    units = plan_units(model, len(trunk.stages), end_to_end=end_to_end)
    outputs = [trunk.stages[unit.stages[-1]].output for unit in units if unit.stages]
    return tuple(head_features(output, model["head_grid"], trunk.prefix_tokens) for output in outputs)


def fed_shapes(shapes: Sequence[LayerShape], parts: Sequence[int]) -> tuple[LayerShape, ...]:
    """The units of a network as they are when fed: no trunk to compute, features instead of maps."""
    result = []
    for number, shape in enumerate(shapes):
        if number < len(parts):
            shape = _without_trunk(shape, sum(parts[number:]), skipped=parts[number - 1] if number else 0)
        elif number == len(parts) and len(shape.input) > 1:
            shape = replace(shape, input=(parts[-1],))
        result.append(shape)
    return tuple(result)


def _without_trunk(shape: LayerShape, rest: int, skipped: int) -> LayerShape:
    """A unit that drops `skipped` numbers and hands on `rest`, or what layers on top of its stages make of them."""
    inner = shape.inner
    assert inner is not None, "a unit of the trunk has stages"
    return replace(
        shape,
        input=(skipped + rest,),
        output=shape.output if len(shape.output) == 1 else (rest,),
        forward_flops=shape.forward_flops - inner.frozen_flops,
        inner=replace(inner, frozen_activations=0, frozen_flops=0),
    )
