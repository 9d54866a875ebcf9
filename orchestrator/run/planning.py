"""From a job to its plan, with the data's own numbers or, offline, with those that the job states. No torch."""

from __future__ import annotations

from hff.shapes import LayerShape
from orchestrator.errors import JobError
from orchestrator.job.network import known_classes, known_train_samples, layer_shapes
from orchestrator.job.schema import Job
from orchestrator.pipeline.plan import Plan, make_plan


def shapes_of(job: Job, classes: int) -> tuple[LayerShape, ...]:
    """The layers of a job. Raises JobError when the architecture does not fit the images."""
    try:
        return layer_shapes(job, classes)
    except ValueError as error:
        raise JobError(f"model: {error}") from error


def plan_for(job: Job, shapes: tuple[LayerShape, ...], samples: int, classes: int) -> Plan:
    """Divide the layers of a job among its workers."""
    return make_plan(
        shapes,
        workers=job.cluster.workers,
        stages=job.cluster.stages,
        global_batch_size=job.train.global_batch_size,
        num_samples=samples,
        num_classes=classes,
        optimizer=job.train.optimizer,
        dtype_bytes=8 if job.train.precision == "float64" else 4,
        end_to_end=job.objective.name == "bp",
    )


def plan_job(job: Job) -> tuple[Plan, list[str]]:
    """The plan of a job and the names of its layers, without looking at data.

    Raises JobError when the job does not state how many images and classes there are.
    """
    samples, classes = known_train_samples(job), known_classes(job)
    if samples is None or classes is None:
        raise JobError(
            "data.expect: must state train_samples and classes for a plan without data "
            "(for example `expect: {train_samples: 50000, classes: 10}`)"
        )
    shapes = shapes_of(job, classes)
    return plan_for(job, shapes, samples, classes), [shape.name for shape in shapes]
