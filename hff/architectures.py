"""From options to layers. The bits of layer k depend on the seed and k alone, not on who builds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hff.aux_convs import AuxConvs
from hff.goodness import GoodnessHead, GoodnessLayer
from hff.layers import LocalLayer, conv_body, linear_body
from hff.objectives import Head, LinearHead, PrototypeHead
from hff.own_network import Architecture, bodies_of
from hff.randomness import derive_seed, seeded
from hff.shapes import HeadShape, LayerShape, MlpOptions, Options, ResnetOptions, describe, units_of
from hff.similarity import SimilarityTerm


@dataclass(frozen=True)
class HeadOptions:
    """What every local head is: `prototype`, `linear`, or `goodness` (`sharpness` and `threshold`).

    The fields from `prototypes_per_class` to `sharpness` concern prototypes. `aux_convs` hidden convolutions come
    before the pooling; `similarity` weighs a contrastive term over the batch; `groups` are the super-classes of all
    classes, where these alone are learned.
    """

    kind: str = "prototype"
    num_classes: int = 10
    prototypes_per_class: int = 1
    margin: float = 0.0
    scale: float = 32.0
    scale_min: float = 16.0
    scale_max: float = 64.0
    learn_scale: bool = True
    sharpness: float = 10.0
    label_smoothing: float = 0.0
    threshold: float = 1.0
    similarity: float = 0.0
    aux_convs: int = 0
    groups: tuple[int, ...] | None = None

    @property
    def shape(self) -> HeadShape:
        return HeadShape(self.kind, self.num_classes, self.prototypes_per_class, self.aux_convs)


@dataclass(frozen=True)
class OwnHead:
    """A head class of the user's own, made as `kind(features, num_classes, grid=..., **options)`."""

    kind: type[Head]
    num_classes: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> HeadShape:
        # Its size is its own affair; a linear head's stands for it.
        return HeadShape("linear", self.num_classes)


AnyHead = HeadOptions | OwnHead


def build_layers(
    options: Options | Architecture,
    input_shape: Sequence[int],
    head: AnyHead | Sequence[AnyHead],
    *,
    seed: int,
    block_size: int = 1,
    end_to_end: bool = False,
    only: Iterable[int] | None = None,
) -> list[LocalLayer]:
    """Build the locally trained units of an architecture, or those numbered in `only`.

    `head` is that of every unit, or one for each. Units are float32 on the CPU. Raises ValueError where the shapes
    do not fit.
    """
    shape = [own.shape for own in head] if isinstance(head, Sequence) else head.shape
    if isinstance(options, Architecture):
        bodies = bodies_of(options, input_shape)
    else:
        bodies = describe(options, input_shape, HeadShape("linear", 1))
    grid = 1 if isinstance(options, MlpOptions) else options.head_grid
    norm = "batch" if isinstance(options, Architecture) else options.norm
    size = len(bodies) if end_to_end else block_size
    units = units_of(bodies, shape, grid, size, norm=norm)
    wanted = range(len(units)) if only is None else only
    layers: list[LocalLayer] = []
    for index in wanted:
        with seeded(derive_seed(seed, "init", index)):
            first = index * size
            numbers = range(first, min(first + size, len(bodies)))
            made = [_body(options, n, bodies[n]) for n in numbers]
            own = head[index] if isinstance(head, Sequence) else head
            body = made[0] if len(made) == 1 else nn.Sequential(*made)
            made_head = make_head(own, units[index].head_features, grid)
            if isinstance(own, HeadOptions) and own.aux_convs:
                made_head.aux = AuxConvs(units[index].output[0], own.aux_convs, grid=grid, norm=norm)
            if isinstance(made_head, GoodnessHead):
                layers.append(GoodnessLayer(units[index].name, body, made_head, entry=index == 0))
            else:
                layers.append(LocalLayer(units[index].name, body, made_head))
    return layers


def _body(options: Options | Architecture, index: int, shape: LayerShape) -> nn.Module:
    if isinstance(options, Architecture):
        return options.body(index, shape.input)
    if isinstance(options, MlpOptions):
        return linear_body(math.prod(shape.input), shape.output[0], norm=options.norm, dropout=options.dropout)
    return conv_body(
        shape.input[0],
        shape.output[0],
        kernel=options.first_kernel if index == 0 else 3,
        stride=options.first_stride if index == 0 else 1,
        norm=options.norm,
        pool=index in options.pool_after,
        shortcut=isinstance(options, ResnetOptions) and index > 0,
    )


def make_head(head: AnyHead, features: int, grid: int, prefix_tokens: int = 0) -> Head:
    """A local head over `features` numbers, which it sees of maps pooled to `grid` x `grid`."""
    made = _own(head, features, grid) if isinstance(head, OwnHead) else _MAKERS[head.kind](head, features, grid)
    made.prefix_tokens = prefix_tokens
    if isinstance(head, HeadOptions):
        if head.similarity:
            made.similarity = SimilarityTerm(head.similarity)
        if head.groups is not None:
            made.learn_groups(head.groups)
    return made


def _own(head: OwnHead, features: int, grid: int) -> Head:
    return head.kind(features, head.num_classes, grid=grid, **head.options)


def _goodness(head: HeadOptions, features: int, grid: int) -> GoodnessHead:
    return GoodnessHead(head.num_classes, threshold=head.threshold, sharpness=head.sharpness)


def _linear(head: HeadOptions, features: int, grid: int) -> LinearHead:
    return LinearHead(features, head.num_classes, grid=grid, label_smoothing=head.label_smoothing)


def _prototypes(head: HeadOptions, features: int, grid: int) -> PrototypeHead:
    return PrototypeHead(
        features,
        head.num_classes,
        grid=grid,
        prototypes_per_class=head.prototypes_per_class,
        margin=head.margin,
        scale=head.scale,
        scale_min=head.scale_min,
        scale_max=head.scale_max,
        learn_scale=head.learn_scale,
        sharpness=head.sharpness,
        label_smoothing=head.label_smoothing,
    )


_MAKERS: Mapping[str, Callable[[HeadOptions, int, int], Head]] = {
    "prototype": _prototypes,
    "linear": _linear,
    "goodness": _goodness,
}
