"""Which workers own which layers, and how fast that will be. No torch.

Ranges of layers and replicas of each stage are chosen so that the slowest stage is as fast as can be under the limit
of memory (partition); the rate is that of the schedule played through with them (simulate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hff.shapes import LayerShape
from orchestrator.errors import JobError
from orchestrator.pipeline.cost import CPU_CORE, LayerCost, Target, layer_costs
from orchestrator.pipeline.partition import Choice, partition
from orchestrator.pipeline.refusals import divisors, no_split
from orchestrator.pipeline.simulate import Played, simulate
from orchestrator.pipeline.stage_cost import Array, Load, StageCosts, StageSeconds


@dataclass(frozen=True)
class StagePlan:
    """One stage: its layers (first and last, inclusive) and what they cost. `memory_bytes` is of one worker."""

    index: int
    layers: tuple[int, int]
    replicas: int
    parameters: int
    memory_bytes: int
    compute_share: float
    bytes_sent_per_step: int


@dataclass(frozen=True)
class Plan:
    """All stages, and what to expect of them.

    `efficiency` is the rate over that of as many workers as fast as one alone; `losses` says where the rest goes, as
    shares of all workers' time: uneven stages, sums over replicas, links, work that replicas repeat, filling. The
    largest is the `limiting_factor`. Each layer trains on a batch in `micro_batches` parts.
    """

    workers: int
    global_batch_size: int
    steps_per_epoch: int
    images_per_second: float
    efficiency: float
    epoch_seconds: float
    limiting_stage: int
    limiting_factor: str
    losses: dict[str, float]
    micro_batches: int
    stages: tuple[StagePlan, ...]

    @property
    def replicas(self) -> list[int]:
        return [stage.replicas for stage in self.stages]

    @property
    def worker_hours_per_epoch(self) -> float:
        return self.workers * self.epoch_seconds / 3600

    def to_json(self) -> dict[str, Any]:
        stages = [{**vars(stage), "layers": list(stage.layers)} for stage in self.stages]
        return {**vars(self), "worker_hours_per_epoch": self.worker_hours_per_epoch, "stages": stages}


def make_plan(
    shapes: Sequence[LayerShape],
    *,
    workers: int,
    stages: int | str,
    global_batch_size: int,
    num_samples: int,
    num_classes: int,
    optimizer: str,
    replicas: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    micro_batches: int | str = 1,
    dtype_bytes: int = 4,
    activation_bytes: int | None = None,
    end_to_end: bool = False,
    target: Target = CPU_CORE,
    costs: Sequence[LayerCost] | None = None,
    memory_limit_bytes: float | None = None,
) -> Plan:
    """Divide the layers among the workers. `costs` replaces the estimate from `target`.

    `replicas` and `layers`, each with a number for every stage, replace the choice of these. With `micro_batches`
    "auto" a batch is computed in as few parts, 1, 2, 4 and so on, as the limit of memory allows.

    Raises JobError when workers, stages, layers and batch do not fit, or no split keeps to the limit of memory.
    """
    whole = Load(
        shapes=shapes,
        costs=costs or layer_costs(shapes, target, optimizer=optimizer, dtype_bytes=dtype_bytes, end_to_end=end_to_end),
        batch=global_batch_size,
        num_classes=num_classes,
        optimizer=optimizer,
        dtype_bytes=dtype_bytes,
        activation_bytes=activation_bytes or dtype_bytes,
    )
    stated = replicas or layers
    number = len(stated) if stated else None if stages == "auto" else int(stages)
    _refuse_stages(workers, number, len(shapes), "cluster.replicas" if replicas else "cluster.stages")
    options = divisors(global_batch_size, most=workers)
    allowed = _allowed(options, number, replicas)
    elsewhere = _elsewhere(layers, len(shapes))
    limit = memory_limit_bytes or np.inf
    for parts in _parts(micro_batches, global_batch_size):
        load = replace(whole, micro_batches=parts)
        costs_of = StageCosts(load, target, options)
        memory = costs_of.memory()
        periods = np.where(memory <= limit, costs_of.periods(), np.inf) + elsewhere
        chosen = partition(periods, options, workers, stages=allowed)
        if chosen is not None:
            break
    else:
        leanest = partition(memory + elsewhere, options, workers, stages=allowed)
        raise no_split(load, workers, number, limit, leanest, free=stated is None)
    timed = [costs_of.stage(c.first, c.last, c.option) for c in chosen]
    steps = _steps(num_samples, global_batch_size)
    played = simulate(timed, steps, latency_s=target.link_latency_s)
    losses = _losses(load, chosen, timed, played, [options[c.option] for c in chosen], steps)
    made = []
    for index, choice in enumerate(chosen):
        own = shapes[choice.first : choice.last + 1]
        made.append(
            StagePlan(
                index=index,
                layers=(choice.first, choice.last),
                replicas=options[choice.option],
                parameters=sum(s.parameters + s.head_parameters for s in own),
                memory_bytes=int(memory[choice.first, choice.last, choice.option]),
                compute_share=_compute(load, choice) / sum(_compute(load, c) for c in chosen),
                bytes_sent_per_step=0 if index == len(chosen) - 1 else global_batch_size * load.sent_bytes(choice.last),
            )
        )
    return Plan(
        workers=workers,
        global_batch_size=global_batch_size,
        steps_per_epoch=steps,
        images_per_second=num_samples / played.total_s,
        efficiency=1 - sum(losses.values()),
        epoch_seconds=played.total_s,
        limiting_stage=max(range(len(timed)), key=lambda i: timed[i].period_s),
        limiting_factor=max(losses, key=lambda name: losses[name]) if max(losses.values()) > 1e-3 else "none",
        losses=losses,
        micro_batches=load.micro_batches,
        stages=tuple(made),
    )


def _compute(load: Load, choice: Choice) -> float:
    return sum(cost.of_batch(load.batch) for cost in load.costs[choice.first : choice.last + 1])


def _steps(samples: int, batch: int) -> int:
    """Steps of an epoch: a last batch of one sample joins the one before."""
    return max(1, samples // batch + (samples % batch >= 2))


def _losses(
    load: Load,
    chosen: Sequence[Choice],
    timed: Sequence[StageSeconds],
    played: Played,
    replicas: Sequence[int],
    steps: int,
) -> dict[str, float]:
    """Shares of all workers' time in which none of them does what one alone would do; with the rest they are 1."""
    slowest = max(timed, key=lambda stage: stage.work_s)
    period = max(stage.period_s for stage in timed)
    everybody = sum(replicas)
    seconds = dict.fromkeys(("uneven stages", "sums over replicas", "links", "repeated by replicas", "filling"), 0.0)
    for choice, stage, count in zip(chosen, timed, replicas, strict=True):
        # Others wait for what the slowest does: that is what holds them up.
        waiting = (slowest.work_s - stage.work_s) / slowest.work_s
        seconds["uneven stages"] += count * waiting * slowest.layers_s * steps
        seconds["sums over replicas"] += count * (stage.sums_s + waiting * slowest.sums_s) * steps
        links = stage.copy_s + waiting * slowest.copy_s + period - slowest.work_s
        seconds["links"] += count * links * steps
        once = sum(cost.step_s for cost in load.costs[choice.first : choice.last + 1])
        seconds["repeated by replicas"] += (count - 1) * once * steps
    seconds["filling"] = everybody * max(0.0, played.total_s - period * steps)
    return {name: value / (everybody * played.total_s) for name, value in seconds.items()}


def _refuse_stages(workers: int, stages: int | None, layers: int, key: str) -> None:
    """Raises JobError for a number of stages that there are not as many layers or workers for."""
    if stages is None:
        return
    if stages > layers:
        must = "must be" if key == "cluster.stages" else "must have"
        raise JobError(f"{key}: {must} at most {layers}, the number of layers, got {stages}")
    if workers < stages:
        raise JobError(f"cluster.workers: must be at least cluster.stages ({stages}), got {workers}; nearest: {stages}")


def _parts(micro_batches: int | str, batch: int) -> list[int]:
    """The numbers of micro-batches to try, the best first."""
    if micro_batches != "auto":
        return [int(micro_batches)]
    return [2**power for power in range(batch.bit_length()) if 2**power <= max(1, batch // 2)]


def _elsewhere(layers: Sequence[int] | None, number: int) -> Array:
    """(L, L, 1): infinite for ranges other than those of so many layers in each stage; 0 for all without these."""
    if layers is None:
        return np.zeros((number, number, 1))
    if sum(layers) != number:
        raise JobError(f"cluster.layers: must add up to {number}, the number of layers, got {sum(layers)}")
    ends = np.cumsum(layers)
    elsewhere = np.full((number, number, 1), np.inf)
    elsewhere[ends - layers, ends - 1] = 0.0
    return elsewhere


def _allowed(options: Sequence[int], number: int | None, replicas: Sequence[int] | None) -> list[list[int]] | None:
    """Indices of the options of each stage; None where even the number of stages is free."""
    if replicas is not None:
        return [[i for i, option in enumerate(options) if option == count] for count in replicas]
    return None if number is None else [list(range(len(options)))] * number
