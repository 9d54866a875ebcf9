"""Why workers cannot share out a network, and what would fit. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from orchestrator.errors import JobError
from orchestrator.pipeline.cost import CPU_CORE
from orchestrator.pipeline.partition import Choice, partition, reachable
from orchestrator.pipeline.stage_cost import Load, StageCosts


def divisors(number: int, *, most: int | None = None) -> list[int]:
    """All divisors up to `most`, ascending: the numbers of replicas that share a batch evenly."""
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


def _near(value: int, allowed: Sequence[int]) -> str:
    below, above = [n for n in allowed if n < value][-1:], [n for n in allowed if n > value][:1]
    return " and ".join(map(str, [*below, *above]))


def _gb(size_bytes: float) -> str:
    """Gigabytes to three figures, rounded up: so much is enough."""
    scale = 10 ** (2 - math.floor(math.log10(size_bytes / 1e9)))
    return f"{math.ceil(size_bytes / 1e9 * scale) / scale:.3g}"


def no_split(
    load: Load,
    workers: int,
    stages: int | None,
    limit_bytes: float,
    leanest: Sequence[Choice] | None,
    *,
    free: bool,
) -> JobError:
    """The error for a number of workers that no split uses up, or whose leanest split exceeds the limit of memory.

    `free` says that the planner may choose layers and replicas of the stages.
    """
    if leanest is None:
        return _no_division(load, workers, stages)
    return _too_much_memory(load, workers, stages, limit_bytes, leanest, free)


def _no_division(load: Load, workers: int, stages: int | None) -> JobError:
    layers = len(load.shapes)
    everything = divisors(load.batch)
    anywhere = np.ones((layers, layers, len(everything)))
    found = reachable(anywhere, everything, min(2 * workers + layers, load.batch * layers), stages)
    count = f"{stages}" if stages else f"at most {layers}"
    return JobError(
        f"cluster.workers: {workers} workers cannot be shared out over {count} stage{'s' if count != '1' else ''} "
        f"whose replicas divide train.global_batch_size ({load.batch}); nearest: {_near(workers, found)}"
    )


def _too_much_memory(
    load: Load,
    workers: int,
    stages: int | None,
    limit_bytes: float,
    leanest: Sequence[Choice],
    free: bool,
) -> JobError:
    options = divisors(load.batch, most=workers)
    memory_LLD = StageCosts(load, CPU_CORE, options).memory()
    worst = max(leanest, key=lambda c: float(memory_LLD[c.first, c.last, c.option]))
    needed = float(memory_LLD[worst.first, worst.last, worst.option])
    remedies = [f"{_gb(needed)} GB each"]
    if free:
        ways = (
            ("train.micro_batches {}", _least_parts),
            ("train.global_batch_size {}", _largest_batch),
            ("{} workers", _more_workers),
        )
        found = [(text, way(load, workers, stages, limit_bytes)) for text, way in ways]
        remedies += [text.format(value) for text, value in found if value is not None]
    text = (
        f"no split of the {len(load.shapes)} layers among {workers} workers fits into "
        f"{_gb(limit_bytes)} GB each; the leanest needs {_gb(needed)} GB, for layers {worst.first} to "
        f"{worst.last}; what would fit: {', or '.join(remedies)}"
    )
    return JobError(findings=[("cluster.memory_gb", text)])


def _leanest_bytes(load: Load, workers: int, stages: int | None) -> float:
    """Memory of the largest worker of the split that needs least; infinite without any split."""
    options = divisors(load.batch, most=workers)
    memory_LLD = StageCosts(load, CPU_CORE, options).memory()
    allowed = None if stages is None else [range(len(options))] * stages
    split = partition(memory_LLD, options, workers, stages=allowed)
    return np.inf if split is None else max(float(memory_LLD[c.first, c.last, c.option]) for c in split)


def _least_parts(load: Load, workers: int, stages: int | None, limit_bytes: float) -> int | None:
    for parts in (2, 4, 8, 16, 32):
        divided = replace(load, micro_batches=parts)
        if load.micro_batches < parts <= load.batch // 2 and _leanest_bytes(divided, workers, stages) <= limit_bytes:
            return parts
    return None


def _largest_batch(load: Load, workers: int, stages: int | None, limit_bytes: float) -> int | None:
    for batch in reversed(divisors(load.batch)[1:-1]):
        if _leanest_bytes(replace(load, batch=batch), workers, stages) <= limit_bytes:
            return batch
    return None


def _more_workers(load: Load, workers: int, stages: int | None, limit_bytes: float) -> int | None:
    for factor in (2, 4, 8, 16):
        if _leanest_bytes(load, factor * workers, stages) <= limit_bytes:
            return factor * workers
    return None
