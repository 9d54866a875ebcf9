"""Relations that follow from what a job's objective is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.job import network
from orchestrator.job.show import show

if TYPE_CHECKING:
    from orchestrator.job.schema import Job

Found = Iterator[tuple[str, str]]


def one_stage(job: Job) -> Found:
    name = job.objective.name
    if not network.one_stage(job):
        return
    if job.cluster.stages not in ("auto", 1):
        yield "cluster.stages", f"must be 1 or auto with objective {name}, got {job.cluster.stages}"
    for key in ("replicas", "layers"):
        given = getattr(job.cluster, key)
        if given is not None and len(given) > 1 and name == "ff":
            yield f"cluster.{key}", f"must have one number with objective ff (one stage), got {show(list(given))}"
    if name == "bp" and job.train.schedule != "simultaneous":
        yield "train.schedule", f"must be simultaneous with objective bp, got {show(job.train.schedule)}"


def goodness(job: Job) -> Found:
    """What the original Forward-Forward needs of a network."""
    if job.objective.name != "ff":
        return
    if network.own_model(job) is None:
        yield "objective.name", f"must be hff, ce, bp or own with {_foreign(job)}, got 'ff'"
    elif getattr(job.model, "norm", None) != "none":
        text = "must be none with objective ff (a norm takes goodness away; lengths are normalised between layers)"
        yield "model.norm", f"{text}, got {show(getattr(job.model, 'norm', None))}"


def aux_convs(job: Job) -> Found:
    """Hidden convolutions work on the maps of our own convolutions."""
    depth = getattr(job.objective, "aux_convs", 0)
    model = network.own_model(job)
    if depth and (model is None or model.arch == "mlp"):
        where = _foreign(job) if model is None else "arch mlp, whose layers have no maps"
        yield "objective.aux_convs", f"must be 0 with {where}, got {depth}"


def coarse(job: Job) -> Found:
    """Super-classes are fewer than classes, and the last layer tells the classes apart."""
    wanted, layers, classes = getattr(job.objective, "coarse", ()), network.units(job), network.known_classes(job)
    if layers is not None and len(wanted) >= layers and wanted:
        left = f"at most {layers - 1}, since the last of the {layers} {network.unit_words(job)} learns all classes"
        yield "objective.coarse", f"must have {left}, got {len(wanted)}"
    for place, groups in enumerate(wanted):
        if classes is not None and groups > classes:
            yield f"objective.coarse.{place}", f"must be at most {classes}, the number of classes, got {groups}"


def _foreign(job: Job) -> str:
    return "a backbone" if network.backbone_model(job) else "a model file"


def own_class(job: Job) -> Found:
    """A section with a file names a class in it."""
    for key, section in (("objective", job.objective), ("model", job.model)):
        if not hasattr(section, "sha256"):
            continue
        given = (section.model_extra or {}).get("class")
        if given is None:
            yield f"{key}.class", f"must be given (the name of a class in {key}.file), got nothing"
        elif not (isinstance(given, str) and given.isidentifier()):
            yield f"{key}.class", f"must be the name of a class, got {show(given)}"


def scale(job: Job) -> Found:
    """A scale that learns never reaches its bounds, so it cannot begin on one."""
    objective = job.objective
    if objective.name != "hff":
        return
    low, high = objective.scale_min, objective.scale_max
    if low > high:
        yield "objective.scale_min", f"must be at most objective.scale_max ({high:g}), got {low:g}"
    elif not low <= objective.scale <= high:
        yield "objective.scale", f"must be from scale_min ({low:g}) to scale_max ({high:g}), got {objective.scale:g}"
    elif objective.learn_scale and objective.scale in (low, high):
        yield "objective.scale", _inside(objective.scale)


def _inside(value: float) -> str:
    return f"must lie inside its bounds while it learns (or set objective.learn_scale: false), got {value:g}"


_HFF_ALONE = ("margin", "scale", "sharpness", "prototypes_per_class")


def per_layer(job: Job) -> Found:
    layers = network.units(job)
    if layers is not None and len(job.per_layer) > layers:
        yield (
            "per_layer",
            f"must have at most one entry for each of the {layers} {network.unit_words(job)}, got {len(job.per_layer)}",
        )
    for i, own in enumerate(job.per_layer):
        for key in _HFF_ALONE:
            if own is not None and getattr(own, key) is not None and job.objective.name != "hff":
                yield (
                    f"per_layer.{i}.{key}",
                    f"must be left out (objective hff alone has it), got {getattr(own, key):g}",
                )
        if job.objective.name == "hff" and own is not None and own.scale is not None:
            low, high = job.objective.scale_min, job.objective.scale_max
            if not low <= own.scale <= high:
                yield (
                    f"per_layer.{i}.scale",
                    f"must be from objective.scale_min ({low:g}) to objective.scale_max ({high:g}), got {own.scale:g}",
                )
            elif job.objective.learn_scale and own.scale in (low, high):
                yield f"per_layer.{i}.scale", _inside(own.scale)
        if own is not None and own.label_smoothing is not None and not hasattr(job.objective, "label_smoothing"):
            yield (
                f"per_layer.{i}.label_smoothing",
                f"must be left out (objective {job.objective.name} has none), got {own.label_smoothing:g}",
            )
