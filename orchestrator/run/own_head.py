"""The user's own objective as a class: its file run once in each process, its mistakes told as the job's."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from hff.architectures import OwnHead, make_head
from hff.objectives import Head
from hff.randomness import seeded
from orchestrator.errors import JobError, first_line
from orchestrator.job import own_objective
from orchestrator.job.objectives import OwnObjective
from orchestrator.job.schema import Job
from orchestrator.run.folder import RunFolder, write_atomically

_SAMPLES = 2


def own_head(objective: Mapping[str, Any], num_classes: int) -> OwnHead:
    """The head that a resolved `objective` section with a file asks for. Raises JobError.

    The code is `source` where the section holds it (a network away from its run), else that of `file`.
    """
    path, source = str(objective["file"]), objective.get("source")
    if source is None:
        try:
            source = own_objective.read(path)
        except ValueError as error:
            raise JobError(f"objective.file: {error}") from None
    found = own_objective.sha256(source)
    if objective["sha256"] not in (None, found):
        raise JobError(f"objective.file: {path} has changed since the job was read; start afresh with --resume never")
    kind = _class_of(path, source, str(objective["class"]))
    return OwnHead(kind, num_classes, own_objective.options(objective))


@functools.lru_cache(maxsize=8)
def _class_of(path: str, source: str, name: str) -> type[Head]:
    module = ModuleType(f"objective_{own_objective.sha256(source)[:12]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        raise JobError(f"objective.file: must be a module that can be run, got {_told(error, path)}") from error
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Head)):
        raise JobError(f"objective.class: must be a subclass of hff.objectives.Head, got {name} of {path}")
    return kind


def try_head(objective: Mapping[str, Any], features: int, num_classes: int) -> None:
    """Make an own head once and show it two samples, before anything starts. Raises JobError for what cannot train."""
    if objective["name"] != "own":
        return
    own, path = own_head(objective, num_classes), str(objective["file"])
    place = f"objective: {objective['class']} of {path}"
    try:
        with seeded(0):
            head = make_head(own, features, grid=1)
    except Exception as error:
        options = ", ".join(own.options) or "none"
        raise JobError(f"{place}: cannot be made with its options ({options}): {_told(error, path)}") from error
    try:
        with seeded(0):
            logit_BC = head.logits(torch.randn(_SAMPLES, features))
            loss_B = head.loss(logit_BC, torch.zeros(_SAMPLES, dtype=torch.int64))
    except Exception as error:
        raise JobError(f"{place}: cannot judge features ({_SAMPLES}, {features}): {_told(error, path)}") from error
    for what, got, wanted in (
        ("logits", logit_BC, (_SAMPLES, num_classes)),
        ("loss", loss_B, (_SAMPLES,)),
    ):
        shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        if shape != wanted:
            raise JobError(f"{place}: {what} must have the shape {wanted} for {_SAMPLES} samples, got {shape}")


def kept_objective(job: Job, folder: RunFolder) -> tuple[Job, Job]:
    """Copy the user's own objective into the run's folder; the job that reads the copy, and as it is written down.

    Written down with the file's name alone, which is relative to the job file: run folders may be moved.
    """
    if not isinstance(job.objective, OwnObjective):
        return job, job
    write_atomically(folder.objective, own_objective.read(job.objective.file))

    def reading(file: str) -> Job:
        return job.model_copy(update={"objective": job.objective.model_copy(update={"file": file})})

    return reading(str(folder.objective)), reading(folder.objective.name)


def with_source(objective: Mapping[str, Any]) -> dict[str, Any]:
    """The section with the code itself, for a network that leaves its run's folder; others as they are."""
    if objective["name"] != "own":
        return dict(objective)
    return {**objective, "source": own_objective.read(str(objective["file"]))}


def _told(error: Exception, path: str) -> str:
    """The error in one line, with the line of the user's file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    what = f"{type(error).__name__}: {first_line(error)}"
    return f"{path}:{lines[-1]}: {what}" if lines else what
