"""A transfer job with everything filled in that its backbone alone can tell."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from orchestrator.job.load import job_from_values
from orchestrator.job.resolved import job_to_dict
from orchestrator.job.schema import Job
from orchestrator.transfer.backbone import input_form, trunk_shape


def resolve(job: Job) -> Job:
    """Fill in image size, normalisation, framing and `heads_at: all`, and check the job again.

    Raises JobError for what could not be told without the backbone: a vote of another length than its stages, a
    crop larger than its images.
    """
    values = job_to_dict(job)
    data, model = values["data"], values["model"]
    form: dict[str, Any] = asdict(input_form(model["backbone"]))
    for key, own in form.items():
        if data[key] in (0, None, [], ()):
            data[key] = list(own) if isinstance(own, tuple) else own
    if model["heads_at"] == "all":
        model["heads_at"] = list(range(len(trunk_shape(model["backbone"], data["image_size"]).stages)))
    return job_from_values(values, place=job.name)
