"""The user's own network: its architecture made from the job's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hff.own_network import Architecture, describe_own
from hff.shapes import HeadShape, LayerShape
from orchestrator.errors import JobError
from orchestrator.job import own_code
from orchestrator.job.load import job_from_values
from orchestrator.job.resolved import job_to_dict
from orchestrator.job.schema import Job
from orchestrator.run.own_code import own_class, told


def own_architecture(model: Mapping[str, Any]) -> Architecture:
    """The network that a resolved `model` section with a file asks for. Raises JobError."""
    kind, options = own_class("model", model, Architecture), own_code.options("model", model)
    try:
        made: Architecture = kind(**options)
        made.head_grid = model["head_grid"]
        depth = made.depth
    except Exception as error:
        given = ", ".join(options) or "none"
        raise JobError(f"{_place(model)}: cannot be made with its options ({given}): {_told(error, model)}") from error
    if type(depth) is not int or depth < 1:
        raise JobError(f"{_place(model)}: depth must be a whole number >= 1, got {depth!r}")
    return made


def own_shapes(
    model: Mapping[str, Any],
    input_shape: Sequence[int],
    head: Sequence[HeadShape],
    *,
    block_size: int,
    end_to_end: bool,
) -> tuple[LayerShape, ...]:
    """`hff.describe_own` for a resolved `model` section, whose mistakes are told as the job's. Raises JobError."""
    try:
        return describe_own(own_architecture(model), input_shape, head, block_size, end_to_end)
    except JobError:
        raise
    except Exception as error:
        size = "x".join(map(str, input_shape))
        raise JobError(f"{_place(model)}: cannot take images of {size}: {_told(error, model)}") from error


def resolve(job: Job) -> Job:
    """The job with the number of its network's bodies filled in, checked again. Raises JobError."""
    values = job_to_dict(job)
    depth = own_architecture(values["model"]).depth
    if values["model"]["layers"] not in (None, depth):
        raise JobError(f"model.layers: must be {depth}, the depth of {_place(values['model'])}, or left out")
    values["model"]["layers"] = depth
    return job_from_values(values, place=job.name)


def _place(model: Mapping[str, Any]) -> str:
    return f"model: {model['class']} of {model['file']}"


def _told(error: Exception, model: Mapping[str, Any]) -> str:
    return told(error, str(model["file"]))
