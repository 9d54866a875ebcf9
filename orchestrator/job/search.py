"""The words of a search: a base job, a space over its values, and how trials are chosen and cut short."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.job import paths
from orchestrator.job import space as spaces
from orchestrator.job.checks import Finding
from orchestrator.job.resolved import flatten
from orchestrator.job.schema import RunName, RunsFolder, Tracking
from orchestrator.job.section import Count, Positive, Section, Words
from orchestrator.job.show import show

_Choices = Annotated[tuple[Any, ...], Field(strict=False)]
_Bounds = Annotated[tuple[float, float], Field(strict=False)]

DEFAULT_SAMPLES = 10
# What a run reports after an epoch, and in which direction it is better.
METRICS = {"val_top1": "max", "val_top5": "max", "train_loss": "min"}
# What a layer can have of its own: path in the job -> key of an entry of `per_layer`.
LAYER_KEYS = {
    f"{section}.{key}": key
    for section, keys in {
        "train": ("lr", "weight_decay"),
        "objective": ("margin", "scale", "sharpness", "label_smoothing", "prototypes_per_class"),
    }.items()
    for key in keys
}
_NOT_VARIED = ("kind", "name", "runs", "cluster", "tracking", "checkpoint", "controls")


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
    """One hyper-parameter search. `base` holds every value of the job that the trials vary, resolved.

    `samples` counts trials, with strategy layerwise those for each layer; without it 10, or the whole grid.
    """

    kind: Literal["search"]
    name: RunName
    runs: RunsFolder = "runs"
    base: dict[str, Any]
    space: dict[str, Domain]
    metric: Words = "val_top1"
    mode: Literal["max", "min"] = "max"
    strategy: Literal["flat", "layerwise"] = "flat"
    samples: Count | None = None
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

    @property
    def domains(self) -> dict[str, dict[str, tuple[Any, ...]]]:
        """The space as plain values."""
        return {path: domain.given() for path, domain in self.space.items()}

    @property
    def trials_each(self) -> int:
        """The number of trials, of each layer with strategy layerwise."""
        if self.sampler == "grid":
            return spaces.combinations(self.domains)
        return DEFAULT_SAMPLES if self.samples is None else self.samples

    @property
    def sign(self) -> int:
        """1 where a higher metric is better, else -1."""
        return 1 if self.mode == "max" else -1


def check_search(job: SearchJob) -> list[Finding]:
    """All broken relations of a search whose single values are fine."""
    found = list(_space(job))
    if paths.is_store(job.runs):
        found.append(Finding("runs", f"must be a folder that all nodes share, for a search, got {show(job.runs)}", ()))
    if not found:
        found = [*_sampling(job), *_metric(job), *_layerwise(job)]
    return found


def _space(job: SearchJob) -> Iterator[Finding]:
    if not job.space:
        yield Finding("space", "must name at least one value of the base job, got none", ("space",))
    known = [path for path in _paths(job.base) if path.split(".")[0] not in _NOT_VARIED]
    for path, domain in job.space.items():
        key, given = f"space.{path}", domain.given()
        if path.split(".")[0] in _NOT_VARIED:
            text = f"must be a value that decides the result of a run (not {', '.join(_NOT_VARIED)}), got {show(path)}"
            yield Finding(key, text, ("space", "base"))
        elif path not in known:
            near = difflib.get_close_matches(path, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            yield Finding(key, f"must be a value of the base job, got {show(path)}{hint}", ("space", "base"))
        if len(given) != 1:
            text = f"must have exactly one of {', '.join(Domain.model_fields)}, got {_and(list(given))}"
            yield Finding(key, text, ("space",))
            continue
        fault = _domain_fault(*next(iter(given.items())))
        if fault:
            yield Finding(key, fault, ("space",))


def _paths(base: dict[str, Any]) -> list[str]:
    """Every key path of a job, sections too."""
    leaves = list(flatten(base))
    sections = {leaf.rpartition(".")[0] for leaf in leaves} - {""}
    return [*leaves, *sorted(sections)]


def _domain_fault(kind: str, values: tuple[Any, ...]) -> str | None:
    if kind in spaces.FINITE:
        return None if values else f"{kind} must have at least one value, got []"
    low, high = values[:2]
    if low >= high:
        return f"{kind} must be [least, greatest], got {show(list(values))}"
    if kind == "quniform" and values[2] > high - low:
        return f"quniform must have a step of at most greatest - least, got {show(list(values))}"
    return None


def _and(names: list[str]) -> str:
    return " and ".join(names) if names else "none"


def _sampling(job: SearchJob) -> Iterator[Finding]:
    kinds = {path: spaces.kind_of(domain) for path, domain in job.domains.items()}
    for path, kind in kinds.items():
        if job.sampler == "grid" and kind not in spaces.FINITE:
            yield Finding(
                f"space.{path}", f"must be grid or choice with sampler grid, got {kind}", ("space", "sampler")
            )
        elif job.sampler != "grid" and kind == "grid":
            text = f"must be choice with sampler {job.sampler} (grid goes with sampler grid), got grid"
            yield Finding(f"space.{path}", text, ("space", "sampler"))
    if job.sampler == "grid" and all(kind in spaces.FINITE for kind in kinds.values()):
        count = spaces.combinations(job.domains)
        if job.samples not in (None, count):
            text = f"must be left out or {count}, the combinations of the grid, got {job.samples}"
            yield Finding("samples", text, ("samples", "sampler", "space"))


def _metric(job: SearchJob) -> Iterator[Finding]:
    needs = ("metric", "mode", "base")
    if job.metric not in METRICS:
        near = difflib.get_close_matches(job.metric, METRICS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        text = f"must be one that a run reports ({', '.join(METRICS)}), got {show(job.metric)}{hint}"
        yield Finding("metric", text, needs)
        return
    if job.metric.startswith("val_") and job.base["data"]["val"] is None:
        text = f"must be one that this base reports (train_loss; others need base.data.val), got {show(job.metric)}"
        yield Finding("metric", text, needs)
    if job.mode != METRICS[job.metric]:
        yield Finding("mode", f"must be {METRICS[job.metric]} with metric {job.metric}, got {show(job.mode)}", needs)


def _layerwise(job: SearchJob) -> Iterator[Finding]:
    if job.strategy != "layerwise":
        return
    base, needs = job.base, ("strategy", "base", "space")
    for path in job.space:
        if path not in LAYER_KEYS:
            text = f"must be a value that a layer can have of its own ({', '.join(LAYER_KEYS)}) with strategy layerwise"
            yield Finding(f"space.{path}", f"{text}, got {show(path)}", needs)
    if base["kind"] != "train":
        yield Finding("strategy", f"must be flat with a base of kind {base['kind']}, got 'layerwise'", needs)
    if base["train"]["schedule"] != "sequential":
        text = "must have train.schedule sequential with strategy layerwise, which settles one layer after the other"
        yield Finding("base", f"{text}, got {show(base['train']['schedule'])}", needs)
    if base["train"]["epochs"] is None:
        yield Finding("base", "must give its duration in train.epochs with strategy layerwise", needs)
    if base["per_layer"]:
        text = "must have no per_layer with strategy layerwise, which finds it"
        yield Finding("base", f"{text}, got {len(base['per_layer'])} entries", needs)
    if base["model"]["vote"] not in ("last", "equal"):
        text = "must have model.vote last or equal with strategy layerwise"
        yield Finding("base", f"{text}, got {show(base['model']['vote'])}", needs)
