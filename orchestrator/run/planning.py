"""From a job to its plan, with the data's own numbers or, offline, with those that the job states.

No torch, except for a backbone or a network of the user's own, whose shapes their code has to tell.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hff.shapes import LayerShape
from orchestrator.errors import JobError
from orchestrator.job.network import (
    backbone_model,
    block_size,
    cached_features,
    file_model,
    head_shape,
    known_classes,
    known_train_samples,
    layer_shapes,
    one_stage,
)
from orchestrator.job.paths import is_remote
from orchestrator.job.schema import Cluster, Expect, Job
from orchestrator.job.show import counted
from orchestrator.pipeline.cost import CPU_CORE, GPU, LayerCost, Target
from orchestrator.pipeline.plan import Plan, make_plan


def resolved(job: Job) -> Job:
    """The job with everything that only its backbone's or its user's code knows; others are complete.

    Raises JobError.
    """
    if backbone_model(job) is not None:
        from orchestrator.transfer.resolve import resolve

        return resolve(job)
    if file_model(job) is not None:
        from orchestrator.run.own_network import resolve as with_depth

        return with_depth(job)
    return job


def backbone_line(job: Job) -> str | None:
    """Get the weights of a resolved job's backbone and say what they are; None when it has none.

    Raises CheckpointError for a file that does not fit, OrchestratorError when the hub cannot be reached.
    """
    model = backbone_model(job)
    if model is None:
        return None
    from orchestrator.transfer.backbone import check_weights

    return f"Backbone {check_weights(model.backbone, model.pretrained, job.data.image_size)}"


def shapes_of(job: Job, classes: int) -> tuple[LayerShape, ...]:
    """The layers of a resolved job. Raises JobError when the architecture does not fit the images."""
    model = backbone_model(job)
    if model is not None:
        from orchestrator.transfer.cached import cached_parts, fed_shapes
        from orchestrator.transfer.units import unit_shapes

        values = model.model_dump(mode="json")
        end_to_end = job.objective.name == "bp"
        shapes = unit_shapes(
            values, job.data.image_size, lambda index: head_shape(job, classes, index), end_to_end=end_to_end
        )
        if cached_features(job) is None:
            return shapes
        return fed_shapes(shapes, cached_parts(values, job.data.image_size, end_to_end=end_to_end))
    own = file_model(job)
    if own is not None:
        from orchestrator.run.own_network import own_shapes

        return own_shapes(
            own.model_dump(mode="json"),
            (job.data.channels, job.data.image_size, job.data.image_size),
            [head_shape(job, classes, layer) for layer in range(own.layers or 0)],
            block_size=block_size(job),
            end_to_end=job.objective.name == "bp",
        )
    try:
        return layer_shapes(job, classes)
    except ValueError as error:
        raise JobError(f"model: {error}") from error


def target_of(cluster: Cluster) -> Target:
    """What the workers and links of a job can do, as far as it is known without measuring."""
    target = GPU if cluster.use_gpu else CPU_CORE
    if cluster.link_gbit_per_s is not None:
        target = replace(target, link_bytes_per_s=cluster.link_gbit_per_s * 1e9 / 8)
    if cluster.link_latency_us is not None:
        target = replace(target, link_latency_s=cluster.link_latency_us * 1e-6)
    return target


def plan_for(
    job: Job,
    shapes: tuple[LayerShape, ...],
    samples: int,
    classes: int,
    costs: Sequence[LayerCost] | None = None,
) -> Plan:
    """Divide the layers of a job among its workers; measured `costs` replace the estimate. Raises JobError."""
    cluster, precision = job.cluster, job.train.precision
    return make_plan(
        shapes,
        workers=cluster.workers,
        stages=1 if one_stage(job) else cluster.stages,
        replicas=cluster.replicas,
        layers=cluster.layers,
        micro_batches=job.train.micro_batches,
        global_batch_size=job.train.global_batch_size,
        num_samples=samples,
        num_classes=classes,
        optimizer=job.train.optimizer,
        dtype_bytes=8 if precision == "float64" else 4,
        activation_bytes=_activation_bytes(job),
        end_to_end=job.objective.name == "bp",
        target=target_of(cluster),
        costs=costs,
        memory_limit_bytes=None if cluster.memory_gb is None else cluster.memory_gb * 1e9,
    )


def _activation_bytes(job: Job) -> int:
    """Of a number between two stages. A job that wants links of bfloat16 has them, unless it asks for shared memory."""
    if job.train.link_precision == "bfloat16" and job.cluster.transport != "shm":
        return 2
    return {"float64": 8, "float32": 4, "bfloat16": 2}[job.train.precision]


def _with_index(job: Job) -> Job:
    """The job with what the index of its training images says, where it states nothing itself."""
    place = job.data.train
    if job.data.expect is not None or is_remote(place) or not (Path(place) / "index.json").exists():
        return job
    from orchestrator.data.index import open_index

    index = open_index(place)
    expect = Expect(train_samples=index.num_samples, classes=len(index.classes))
    return job.model_copy(update={"data": job.data.model_copy(update={"expect": expect})})


@dataclass(frozen=True)
class Planned:
    """What a job says of itself without its data: layers, training images per epoch, classes."""

    job: Job
    shapes: tuple[LayerShape, ...]
    samples: int
    classes: int


def offline(job: Job) -> Planned:
    """All that a plan needs: what the job states of its data, or else what a local index says of them.

    Raises JobError when neither is there, DataError for an index that cannot be read.
    """
    job = _with_index(job)
    samples, classes = known_train_samples(job), known_classes(job)
    if samples is None or classes is None:
        text = (
            f"must state train_samples and classes for a plan without data, and {job.data.train} has no index here "
            "(for example `expect: {train_samples: 50000, classes: 10}`)"
        )
        raise JobError(findings=[("data.expect", text)])
    job = resolved(job)
    return Planned(job, shapes_of(job, classes), samples, classes)


def own_cores(job: Job) -> int | None:
    """Cores of this machine where it alone will compute for the job; None for a cluster, or on GPUs."""
    elsewhere = job.cluster.launcher == "ray" and "RAY_ADDRESS" in os.environ
    return None if elsewhere or job.cluster.use_gpu else os.cpu_count()


def sequential_note(job: Job, stages: int) -> str | None:
    """A line on which stages wait where one layer learns after the other."""
    if job.train.schedule != "sequential":
        return None
    idle = "" if stages == 1 else "; stages before it run theirs forward, stages behind it idle"
    return (
        f"note: sequential: one layer learns at a time, frozen ones are computed anew for each batch{idle}. "
        "The predicted rate is that of training all at once"
    )


def sharing_note(workers: int, cores: int | None) -> str | None:
    """A line on workers that are more than the cores of the one machine."""
    if cores is None or workers <= cores:
        return None
    shared = counted(cores, "core")
    return f"note: {workers} workers share {shared} of this machine; the prediction assumes a core for each"
