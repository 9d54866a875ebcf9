"""Which worker owns which layers: contiguous ranges that make the slowest stage as fast as can be. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hff.shapes import LayerShape
from orchestrator.errors import JobError
from orchestrator.pipeline.cost import layer_costs, widest_map

# Numbers that an optimizer keeps per parameter.
_OPTIMIZER_STATE = {"adamw": 2, "sgd": 1}
_SLOTS = 3


@dataclass(frozen=True)
class StagePlan:
    """One stage: its layers (first and last, inclusive) and what they cost."""

    index: int
    layers: tuple[int, int]
    replicas: int
    parameters: int
    memory_bytes: int
    compute_share: float
    bytes_sent_per_step: int


@dataclass(frozen=True)
class Plan:
    """All stages. `images_per_second` is an estimate for one CPU core per worker; `balance` is mean over maximum
    stage time, the most that the pipeline's efficiency can be."""

    workers: int
    global_batch_size: int
    steps_per_epoch: int
    images_per_second: float
    limiting_stage: int
    balance: float
    stages: tuple[StagePlan, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "workers": self.workers,
            "global_batch_size": self.global_batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "images_per_second": self.images_per_second,
            "limiting_stage": self.limiting_stage,
            "balance": self.balance,
            "stages": [{**vars(stage), "layers": list(stage.layers)} for stage in self.stages],
        }


def split(costs: Sequence[float], stages: int) -> list[tuple[int, int]]:
    """Divide layers into contiguous non-empty ranges (first, last) whose largest sum is as small as can be.

    Exact, by dynamic programming over the number of layers and stages; ties go to the earliest border.
    """
    layers = len(costs)
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best = [[math.inf] * (layers + 1) for _ in range(stages + 1)]
    cut = [[0] * (layers + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, stages + 1):
        for end in range(stage, layers + 1):
            for start in range(stage - 1, end):
                slowest = max(best[stage - 1][start], total[end] - total[start])
                if slowest < best[stage][end]:
                    best[stage][end], cut[stage][end] = slowest, start
    ranges: list[tuple[int, int]] = []
    end = layers
    for stage in range(stages, 0, -1):
        start = cut[stage][end]
        ranges.append((start, end - 1))
        end = start
    return ranges[::-1]


def choose_stages(workers: int, stages: int | str, layers: int) -> int:
    """The number of stages: as asked, or the most that divide the workers. Raises JobError."""
    if stages == "auto":
        return max(n for n in range(1, min(workers, layers) + 1) if workers % n == 0)
    number = int(stages)
    if number > layers:
        raise JobError(f"cluster.stages: must be at most {layers}, the number of layers, got {number}")
    if workers % number:
        lower, upper = workers // number * number, (workers // number + 1) * number
        nearest = f"{lower} or {upper}" if lower else str(upper)
        raise JobError(
            f"cluster.workers: must be a multiple of cluster.stages ({number}), got {workers} (nearest: {nearest})"
        )
    return number


def make_plan(
    shapes: Sequence[LayerShape],
    *,
    workers: int,
    stages: int | str,
    global_batch_size: int,
    num_samples: int,
    num_classes: int,
    optimizer: str,
    dtype_bytes: int = 4,
    end_to_end: bool = False,
    costs: Sequence[float] | None = None,
) -> Plan:
    """Divide the layers among the workers. `costs` (seconds per sample) replaces the estimate.

    Raises JobError when the numbers of workers, stages and layers do not fit.
    """
    number = choose_stages(workers, stages, len(shapes))
    replicas = workers // number
    if global_batch_size < 2 * replicas:
        raise JobError(
            f"train.global_batch_size: must be at least {2 * replicas}, two samples for each of the {replicas} "
            f"replicas, got {global_batch_size}"
        )
    seconds = costs or layer_costs(shapes, dtype_bytes=dtype_bytes, end_to_end=end_to_end)
    ranges = split(seconds, number)
    times = [sum(seconds[first : last + 1]) for first, last in ranges]
    batch = -(-global_batch_size // replicas)
    remainder = num_samples % global_batch_size
    steps = max(1, num_samples // global_batch_size + (1 if remainder >= 2 * replicas else 0))
    made = []
    for index, (first, last) in enumerate(ranges):
        own = shapes[first : last + 1]
        sent = 0
        if index < number - 1:
            sent = batch * (dtype_bytes * math.prod(own[-1].output) + 8)
        made.append(
            StagePlan(
                index=index,
                layers=(first, last),
                replicas=replicas,
                parameters=sum(s.parameters + s.head_parameters for s in own),
                memory_bytes=_memory(own, batch, dtype_bytes, optimizer, sent, num_classes, index),
                compute_share=times[index] / sum(times),
                bytes_sent_per_step=sent * replicas,
            )
        )
    return Plan(
        workers=workers,
        global_batch_size=global_batch_size,
        steps_per_epoch=steps,
        images_per_second=replicas / max(times),
        limiting_stage=max(range(number), key=lambda i: times[i]),
        balance=sum(times) / number / max(times),
        stages=tuple(made),
    )


def _memory(
    own: Sequence[LayerShape],
    batch: int,
    dtype_bytes: int,
    optimizer: str,
    sent: int,
    num_classes: int,
    index: int,
) -> int:
    """Weights, gradients, optimizer state, the largest layer's activations and the link buffers of a stage."""
    parameters = sum(s.parameters + s.head_parameters for s in own)
    frozen = sum(s.inner.frozen_parameters for s in own if s.inner)
    buffers = sum(s.buffers for s in own)
    held = frozen + (parameters - frozen) * (2 + _OPTIMIZER_STATE[optimizer]) + buffers
    activations = max(math.prod(s.input) + _kept(s) + s.head_features + 2 * num_classes for s in own)
    received = _SLOTS * batch * math.prod(own[0].input) if index else 0
    return dtype_bytes * (held + batch * activations + received) + _SLOTS * sent


def _kept(shape: LayerShape) -> int:
    """Numbers of one sample that a unit keeps for its gradient; when it is done, all is freed."""
    if shape.inner is None:
        return 3 * widest_map(shape)  # its convolution's and its norm's output, and what goes on
    return shape.inner.activations + 2 * math.prod(shape.output)
