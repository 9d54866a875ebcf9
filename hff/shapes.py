"""What an architecture will look like, without building it: shapes, parameters, arithmetic. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Inner:
    """What a body of many modules does inside, where its input and output do not tell. Per sample, forward only.

    `activations` are the numbers that its modules put out; frozen parts keep nothing for a gradient.
    """

    activations: int
    frozen_activations: int = 0
    frozen_parameters: int = 0
    frozen_flops: int = 0


@dataclass(frozen=True)
class LayerShape:
    """One locally trained unit. Counts are per sample and forward only; `parameters` excludes the head's.

    `buffers` are those of body and head.
    """

    name: str
    input: Shape
    output: Shape
    head_features: int
    parameters: int
    head_parameters: int
    buffers: int
    forward_flops: int
    head_flops: int
    inner: Inner | None = None
    # Numbers that the hidden convolutions of the head put out.
    head_activations: int = 0


@dataclass(frozen=True)
class HeadShape:
    """The kind and size of every local head, behind `aux_convs` hidden convolutions."""

    kind: str
    num_classes: int
    prototypes_per_class: int = 1
    aux_convs: int = 0

    def parameters(self, features: int) -> int:
        if self.kind == "goodness":
            return 0
        if self.kind == "linear":
            return self.num_classes * (features + 1)
        return self.num_classes * self.prototypes_per_class * features + 1

    def flops(self, features: int) -> int:
        if self.kind == "goodness":
            return 2 * features
        prototypes = self.prototypes_per_class if self.kind == "prototype" else 1
        return 2 * self.num_classes * prototypes * features


@dataclass(frozen=True)
class MlpOptions:
    """Fully connected layers of the given widths, each linear, norm, ReLU."""

    widths: tuple[int, ...]
    norm: str = "batch"
    dropout: float = 0.0


@dataclass(frozen=True)
class VggOptions:
    """Convolutions of the given widths; `pool_after` numbers, from 0, those followed by a 2x2 max-pool.

    The first has kernel `first_kernel` and stride `first_stride`, the others 3 and 1. A head sees its map
    average-pooled to at most `head_grid` x `head_grid`.
    """

    widths: tuple[int, ...]
    pool_after: tuple[int, ...] = ()
    first_kernel: int = 3
    first_stride: int = 1
    head_grid: int = 4
    norm: str = "batch"


@dataclass(frozen=True)
class ResnetOptions(VggOptions):
    """VggOptions with a shortcut around every convolution but the first; it has no parameters.

    Channels that the input of a convolution lacks are zeros, so widths must not fall.
    """


ARCHITECTURES: dict[str, type[MlpOptions] | type[VggOptions]] = {
    "mlp": MlpOptions,
    "vgg": VggOptions,
    "resnet": ResnetOptions,
}
Options = MlpOptions | VggOptions


def describe(
    options: Options,
    input_shape: Sequence[int],
    head: HeadShape | Sequence[HeadShape],
    block_size: int = 1,
    end_to_end: bool = False,
) -> tuple[LayerShape, ...]:
    """Describe every locally trained unit of an architecture.

    `input_shape` is (C, H, W). `head` is that of every unit, or one for each. `block_size` bodies share one head;
    `end_to_end` makes one unit of all. Raises ValueError where the shapes do not fit.
    """
    bodies = _mlp(options, input_shape) if isinstance(options, MlpOptions) else _vgg(options, input_shape)
    grid = options.head_grid if isinstance(options, VggOptions) else 1
    return units_of(bodies, head, grid, len(bodies) if end_to_end else block_size, norm=options.norm)


def units_of(
    bodies: Sequence[LayerShape], head: HeadShape | Sequence[HeadShape], grid: int, size: int, norm: str = "batch"
) -> tuple[LayerShape, ...]:
    """Locally trained units of `size` bodies each, with a head behind the last of them.

    The head sees its map pooled to at most `grid` x `grid`, `norm` is that of its hidden convolutions. Raises
    ValueError where the shapes do not fit.
    """
    units: list[LayerShape] = []
    for start in range(0, len(bodies), size):
        own = head if isinstance(head, HeadShape) else head[len(units)]
        if own.kind == "goodness" and own.num_classes > math.prod(bodies[0].input):
            raise ValueError(f"{own.num_classes} labels do not fit into images of {math.prod(bodies[0].input)} numbers")
        group = bodies[start : start + size]
        features = head_features(group[-1].output, grid)
        aux = _aux(group[-1].output, grid, own.aux_convs, norm)
        inner = [body.inner for body in group if body.inner is not None]
        units.append(
            LayerShape(
                name=group[0].name if len(group) == 1 else f"{group[0].name}..{group[-1].name}",
                input=group[0].input,
                output=group[-1].output,
                head_features=features,
                parameters=sum(b.parameters for b in group),
                head_parameters=own.parameters(features) + aux.parameters,
                buffers=sum(b.buffers for b in group) + aux.buffers,
                forward_flops=sum(b.forward_flops for b in group),
                head_flops=own.flops(features) + aux.forward_flops,
                inner=Inner(sum(part.activations for part in inner)) if inner else None,
                head_activations=own.aux_convs * math.prod(aux.output),
            )
        )
    return tuple(units)


def head_features(output: Shape, grid: int, prefix_tokens: int = 0) -> int:
    """Numbers that a head sees of one sample's output: a map (C, H, W), tokens (N, D) or features (D,)."""
    if len(output) == 1:
        return output[0]
    if len(output) == 2:
        side = math.isqrt(output[0] - prefix_tokens)
        output = (output[1], side, side)
    channels, height, width = output
    return channels * min(grid, height) * min(grid, width)


def aux_side(grid: int, side: int) -> int:
    """The side of the map that a head's hidden convolutions work on."""
    return min(2 * grid, side)


def _aux(output: Shape, grid: int, depth: int, norm: str) -> LayerShape:
    """The hidden convolutions of a head. Raises ValueError where there is no map."""
    if depth == 0:
        return _body("aux", (), (0,), 0, 0, 0)
    if len(output) != 3:
        raise ValueError(f"aux_convs need maps, and the layers' outputs are vectors of {output[0]} numbers")
    width, height, side = output[0], aux_side(grid, output[1]), aux_side(grid, output[2])
    scale, buffers = _norm(norm, width)
    weights = 9 * width * width
    parameters = weights + scale + (width if norm == "none" else 0)
    return _body(
        "aux", (), (width, height, side), depth * parameters, depth * buffers, depth * 2 * weights * height * side
    )


def _body(name: str, source: Shape, output: Shape, parameters: int, buffers: int, flops: int) -> LayerShape:
    return LayerShape(name, source, output, 0, parameters, 0, buffers, flops, 0)


def _norm(norm: str, width: int) -> tuple[int, int]:
    """Parameters and buffers (numbers, with the counter of batches) of a norm."""
    return (0 if norm == "none" else 2 * width, 2 * width + 1 if norm == "batch" else 0)


def _mlp(options: MlpOptions, input_shape: Sequence[int]) -> list[LayerShape]:
    source: Shape = tuple(input_shape)
    bodies = []
    for i, width in enumerate(options.widths):
        fan_in = math.prod(source)
        scale, buffers = _norm(options.norm, width)
        bias = width if options.norm == "none" else 0
        parameters = fan_in * width + bias + scale
        bodies.append(_body(f"linear{i}", source, (width,), parameters, buffers, 2 * fan_in * width))
        source = (width,)
    return bodies


def _vgg(options: VggOptions, input_shape: Sequence[int]) -> list[LayerShape]:
    depth = len(options.widths)
    wrong = [p for p in options.pool_after if not 0 <= p < depth]
    if wrong:
        raise ValueError(f"pool_after must number layers from 0 to {depth - 1}, got {wrong[0]}")
    if isinstance(options, ResnetOptions) and list(options.widths) != sorted(options.widths):
        raise ValueError(f"widths of a resnet must not fall, got {list(options.widths)}")
    channels, height, width = input_shape
    bodies = []
    for i, out in enumerate(options.widths):
        kernel, stride = (options.first_kernel, options.first_stride) if i == 0 else (3, 1)
        if kernel % 2 == 0:
            raise ValueError(f"first_kernel must be odd, got {kernel}")
        source = (channels, height, width)
        height, width = ((n - 1) // stride + 1 for n in (height, width))
        scale, buffers = _norm(options.norm, out)
        bias = out if options.norm == "none" else 0
        weights = channels * kernel * kernel * out
        flops = 2 * weights * height * width
        if i in options.pool_after:
            height, width = height // 2, width // 2
            if height == 0 or width == 0:
                raise ValueError(
                    f"the map is pooled to nothing after layer {i}; use fewer entries in pool_after "
                    "or a larger image_size"
                )
        bodies.append(_body(f"conv{i}", source, (out, height, width), weights + bias + scale, buffers, flops))
        channels = out
    return bodies
