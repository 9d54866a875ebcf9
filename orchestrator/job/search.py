"""The words of a search: a base job, a space over its values, and how trials are chosen and cut short."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.job.checks import Finding
from orchestrator.job.schema import Count, Positive, RunName, RunsFolder, Section, Tracking, Words

_Choices = Annotated[tuple[Any, ...], Field(strict=False)]
_Bounds = Annotated[tuple[float, float], Field(strict=False)]


class Domain(Section):
    """Where one value of the base job may lie: exactly one of these. Both bounds belong to the domain."""

    choice: _Choices | None = None
    uniform: _Bounds | None = None
    loguniform: Annotated[tuple[Positive, Positive], Field(strict=False)] | None = None
    randint: Annotated[tuple[int, int], Field(strict=False)] | None = None
    quniform: Annotated[tuple[float, float, Positive], Field(strict=False)] | None = None
    grid: _Choices | None = None

    def given(self) -> dict[str, tuple[Any, ...]]:
        """The domains that are there, by name; one in a valid search."""
        return {k: v for k in type(self).model_fields if (v := getattr(self, k)) is not None}


class Scheduler(Section):
    """When a trial is cut short: compared with others after `grace_epochs` and each `reduction_factor` times more."""

    name: Literal["asha", "median", "none"] = "none"
    grace_epochs: Count = 1
    reduction_factor: Annotated[int, Field(ge=2, le=16)] = 3


class SearchJob(Section):
    """One hyper-parameter search. `base` holds every value of the job that the trials vary, resolved."""

    kind: Literal["search"]
    name: RunName
    runs: RunsFolder = "runs"
    base: dict[str, Any]
    space: dict[str, Domain]
    metric: Words = "val_top1"
    mode: Literal["max", "min"] = "max"
    strategy: Literal["flat", "layerwise"] = "flat"
    samples: Count = 10
    concurrency: Literal["auto"] | Count = "auto"
    scheduler: Scheduler = Scheduler()
    sampler: Literal["random", "grid", "tpe"] = "random"
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _relations(self) -> Self:
        found = check_search(self)
        if found:
            text = "\n".join(f"{f.key}: {f.text}" for f in found)
            raise PydanticCustomError("relations", "{text}", {"text": text, "found": found})
        return self


def check_search(job: SearchJob) -> list[Finding]:
    """All broken relations of a search whose single values are fine."""
    found = []
    if not job.space:
        found.append(Finding("space", "must name at least one value of the base job, got none", ("space",)))
    for path, domain in job.space.items():
        given = domain.given()
        if len(given) != 1:
            kinds = ", ".join(Domain.model_fields)
            found.append(Finding("space", f"{path} must have exactly one of {kinds}, got {len(given)}", ("space",)))
    return found
