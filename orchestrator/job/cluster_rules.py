"""Relations between workers, stages, replicas and the batch that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.job import network
from orchestrator.job.objective_rules import Found
from orchestrator.job.show import show

if TYPE_CHECKING:
    from orchestrator.job.schema import Job


def mesh(job: Job) -> Found:
    workers, stages, layers = job.cluster.workers, job.cluster.stages, network.units(job)
    if job.cluster.replicas is not None or stages == "auto" or (network.one_stage(job) and stages > 1):
        return
    if layers is not None and stages > layers:
        yield "cluster.stages", f"must be at most {layers}, the number of {network.unit_words(job)}, got {stages}"
    elif workers < stages:
        yield "cluster.workers", f"must be at least cluster.stages ({stages}), got {workers}; nearest: {stages}"


def replicas(job: Job) -> Found:
    """One number for each stage, each with an even share of the batch, and every worker counted."""
    counts, stages, layers = job.cluster.replicas, job.cluster.stages, network.units(job)
    if counts is None:
        return
    if stages != "auto" and len(counts) != stages:
        yield "cluster.replicas", f"must have one number for each of the {stages} stages, got {show(list(counts))}"
    elif layers is not None and len(counts) > layers:
        yield (
            "cluster.replicas",
            f"must have at most {layers} numbers, one for each of the {network.unit_words(job)}, "
            f"got {show(list(counts))}",
        )
    elif sum(counts) != job.cluster.workers:
        yield (
            "cluster.replicas",
            f"must add up to cluster.workers ({job.cluster.workers}), got {show(list(counts))}: {sum(counts)}",
        )
    else:
        batch = job.train.global_batch_size
        for count in counts:
            if batch % count:
                yield (
                    "cluster.replicas",
                    f"must divide train.global_batch_size ({batch}), got {count}; nearest: {_divisors(batch, count)}",
                )


def elastic(job: Job) -> Found:
    cluster, least = job.cluster, job.cluster.min_workers
    if least is None:
        return
    if cluster.launcher == "process":
        yield (
            "cluster.workers",
            f"must be a number with cluster.launcher process, got {{min: {least}, max: {cluster.workers}}}",
        )
    if least > cluster.workers:
        yield "cluster.workers", f"must have a min of at most max, got {{min: {least}, max: {cluster.workers}}}"
    for key in ("replicas", "layers"):
        if getattr(cluster, key) is not None:
            yield f"cluster.{key}", f"must be left out with a range of workers, got {show(list(getattr(cluster, key)))}"
    if cluster.stages != "auto" and least < cluster.stages:
        yield "cluster.workers", f"must have a min of at least cluster.stages ({cluster.stages}), got {least}"


def stage_layers(job: Job) -> Found:
    """One number for each stage, and every layer in one of them."""
    layers, stages, replicas, units = job.cluster.layers, job.cluster.stages, job.cluster.replicas, network.units(job)
    if layers is None:
        return
    got = f"got {show(list(layers))}"
    if stages != "auto" and len(layers) != stages:
        yield "cluster.layers", f"must have one number for each of the {stages} stages, {got}"
    elif replicas is not None and len(layers) != len(replicas):
        yield "cluster.layers", f"must have as many numbers as cluster.replicas ({len(replicas)}), {got}"
    elif units is not None and sum(layers) != units:
        yield "cluster.layers", f"must add up to {units}, the number of {network.unit_words(job)}, {got}: {sum(layers)}"
    elif len(layers) > job.cluster.workers:
        yield (
            "cluster.layers",
            f"must have at most {job.cluster.workers} numbers, as many as cluster.workers, {got}",
        )


def micro_batches(job: Job) -> Found:
    parts, batch = job.train.micro_batches, job.train.global_batch_size
    if parts == "auto":
        if job.cluster.memory_gb is None:
            yield "train.micro_batches", "must be a number without cluster.memory_gb, got 'auto'"
    elif parts > max(1, batch // 2):
        yield (
            "train.micro_batches",
            f"must be at most {max(1, batch // 2)}, two samples of train.global_batch_size ({batch}) in each, "
            f"got {parts}",
        )


def _divisors(batch: int, value: int) -> str:
    """The nearest numbers of replicas that share a batch evenly."""
    below = next(n for n in range(min(value, batch), 0, -1) if batch % n == 0)
    above = next((n for n in range(value, batch + 1) if batch % n == 0), None)
    return f"{below}" if above is None else f"{below} and {above}"


def batch(job: Job) -> Found:
    workers, batch = job.cluster.workers, job.train.global_batch_size
    one = network.one_stage(job) or network.units(job) == 1
    single = job.cluster.stages == 1 or (job.cluster.stages == "auto" and one)
    if single and job.cluster.replicas is None and batch % workers:
        yield (
            "train.global_batch_size",
            f"must be a multiple of the {workers} replicas "
            f"({workers} workers / 1 stages), got {batch}; "
            f"nearest: {_nearest(batch, workers)}",
        )
    elif batch == 1 and "batch" in (getattr(job.model, "norm", None), getattr(job.model, "top_norm", None)):
        yield "train.global_batch_size", "must be at least 2 with norm batch, got 1"


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} and {below + unit}" if below else str(unit)


def transport(job: Job) -> Found:
    if job.cluster.transport == "nccl" and not job.cluster.use_gpu:
        yield "cluster.transport", "must be auto, shm or gloo without cluster.use_gpu, got 'nccl'"
