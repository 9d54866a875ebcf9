"""The locally trained units of a transfer job: stages of a trunk with a head behind the last of each, layers on top."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hff.architectures import AnyHead, make_head
from hff.layers import Frozen, LocalLayer, Pooled, linear_body
from hff.measured import Measured
from hff.randomness import derive_seed, seeded
from hff.shapes import HeadShape, Inner, LayerShape, Shape, head_features
from orchestrator.errors import JobError
from orchestrator.transfer.backbone import TrunkShape, build_trunk, trunk_shape


@dataclass(frozen=True)
class Unit:
    """Which stages of the trunk and which layers on top one unit holds; its head sits behind the last of them."""

    name: str
    stages: tuple[int, ...]
    tops: tuple[int, ...] = ()


def plan_units(model: dict[str, Any], stages: int, *, end_to_end: bool) -> tuple[Unit, ...]:
    """Divide `stages` trunk stages and the layers on top into units.

    A unit ends at each stage of `heads_at`; stages behind the last head are left out, or feed the layers on top.
    `end_to_end` makes one unit of all. Raises JobError for a head at a stage that is not there.
    """
    tops = tuple(range(len(model["top_widths"])))
    if end_to_end:
        return (Unit(_name(range(stages), tops), tuple(range(stages)), tops),)
    units = []
    start = 0
    heads = head_stages(model, stages)
    for head in heads:
        own = tuple(range(start, head + 1))
        units.append(Unit(_name(own, ()), own))
        start = head + 1
    for top in tops:
        rest = tuple(range(start, stages)) if top == 0 else ()
        units.append(Unit(_name(rest, (top,)), rest, (top,)))
    return tuple(units)


def _name(stages: Iterable[int], tops: Iterable[int]) -> str:
    names = [f"stage{s}" for s in stages] + [f"top{t}" for t in tops]
    return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"


def head_stages(model: dict[str, Any], stages: int) -> list[int]:
    """The stages with a head, from the bottom. Raises JobError for one that is not there."""
    if isinstance(model["heads_at"], str):
        return list(range(stages)) if model["heads_at"] == "all" else [stages - 1]
    wanted = sorted(set(model["heads_at"]))
    if wanted[-1] >= stages:
        raise JobError(
            f"model.heads_at: must number stages of {model['backbone']} from 0 to {stages - 1}, got {wanted[-1]}"
        )
    return wanted


def frozen_stages(model: dict[str, Any], stages: int) -> int:
    """How many stages from the bottom never learn. Raises JobError when there are not so many."""
    freeze = model["freeze"]
    if isinstance(freeze, str):
        return stages if freeze == "all" else 0
    if freeze > stages:
        raise JobError(f"model.freeze: must be at most {stages}, the stages of {model['backbone']}, got {freeze}")
    return int(freeze)


def unit_shapes(
    model: dict[str, Any], image_size: int, head: Callable[[int], HeadShape], *, end_to_end: bool
) -> tuple[LayerShape, ...]:
    """What the units of a transfer job look like, without weights; `head` is that of each. Raises JobError."""
    trunk = trunk_shape(model["backbone"], image_size)
    frozen = frozen_stages(model, len(trunk.stages))
    shapes: list[LayerShape] = []
    source: Shape = trunk.input
    for index, unit in enumerate(plan_units(model, len(trunk.stages), end_to_end=end_to_end)):
        shape = _unit_shape(model, trunk, unit, source, frozen, head(index))
        shapes.append(shape)
        source = shape.output
    return tuple(shapes)


def _unit_shape(
    model: dict[str, Any], trunk: TrunkShape, unit: Unit, source: Shape, frozen: int, head: HeadShape
) -> LayerShape:
    own = [trunk.stages[i] for i in unit.stages]
    still = [trunk.stages[i] for i in unit.stages if i < frozen]
    learning = own[len(still) :]
    output = own[-1].output if own else source
    parameters, buffers, flops = (sum(getattr(s, k) for s in own) for k in ("parameters", "buffers", "flops"))
    for top in unit.tops:
        fan_in = head_features(output, model["head_grid"], trunk.prefix_tokens)
        width, norm = model["top_widths"][top], model["top_norm"]
        parameters += fan_in * width + (width if norm == "none" else 2 * width)
        buffers += 2 * width + 1 if norm == "batch" else 0
        flops += 2 * fan_in * width
        output = (width,)
    features = head_features(output, model["head_grid"], trunk.prefix_tokens)
    inner = Inner(
        activations=_total(learning, "activations") + 3 * sum(model["top_widths"][t] for t in unit.tops),
        frozen_activations=_total(still, "activations"),
        frozen_parameters=_total(still, "parameters"),
        frozen_flops=_total(still, "flops"),
    )
    return LayerShape(
        name=unit.name,
        input=source,
        output=output,
        head_features=features,
        parameters=parameters,
        head_parameters=head.parameters(features),
        buffers=buffers,
        forward_flops=flops,
        head_flops=head.flops(features),
        inner=inner if own else None,
    )


def _total(stages: Sequence[Measured], count: str) -> int:
    return sum(getattr(s, count) for s in stages)


def build_units(
    model: dict[str, Any],
    head: Callable[[int], AnyHead],
    *,
    image_size: int,
    seed: int,
    end_to_end: bool,
    only: Iterable[int] | None = None,
    pretrained: bool = True,
) -> list[LocalLayer]:
    """Build the units of a transfer job, or those numbered in `only`, with the head of each; float32 on the CPU.

    Their bits depend on the weights' file and on `seed` alone. Without `pretrained` the trunk's weights are left
    random, for a checkpoint that will fill them.
    """
    trunk = trunk_shape(model["backbone"], image_size)
    shapes = unit_shapes(model, image_size, lambda index: head(index).shape, end_to_end=end_to_end)
    units = plan_units(model, len(trunk.stages), end_to_end=end_to_end)
    stages = build_trunk(model["backbone"], model["pretrained"] if pretrained else False, image_size, seed)
    frozen = frozen_stages(model, len(stages))
    layers = []
    for index in range(len(units)) if only is None else only:
        unit, shape = units[index], shapes[index]
        with seeded(derive_seed(seed, "init", index)):
            body: OrderedDict[str, nn.Module] = OrderedDict()
            for i in unit.stages:
                body[f"stage{i}"] = Frozen(stages[i]) if i < frozen else stages[i]
            body.update(_tops(model, unit, shape.input, trunk))
            made = make_head(head(index), shape.head_features, model["head_grid"], trunk.prefix_tokens)
            layers.append(LocalLayer(unit.name, nn.Sequential(body), made))
    return layers


def _tops(model: dict[str, Any], unit: Unit, source: Shape, trunk: TrunkShape) -> list[tuple[str, nn.Module]]:
    """The layers on top of a unit; the first of all reads its map pooled as a head would."""
    parts: list[tuple[str, nn.Module]] = []
    shape = trunk.stages[unit.stages[-1]].output if unit.stages else source
    for top in unit.tops:
        if len(shape) > 1:
            parts.append(("pooled", Pooled(model["head_grid"], trunk.prefix_tokens)))
        fan_in = head_features(shape, model["head_grid"], trunk.prefix_tokens)
        width = model["top_widths"][top]
        parts.append((f"top{top}", linear_body(fan_in, width, norm=model["top_norm"], dropout=0.0)))
        shape = (width,)
    return parts
