"""Stand-ins for the unusable values of a draft, so that its other values can be checked all the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from orchestrator.job.document import Path
from orchestrator.job.messages import Problem, Root, known_paths, lookup
from orchestrator.job.schema import TrainJob, TransferJob
from orchestrator.job.search import SearchJob

KINDS: dict[str, Root] = {"train": TrainJob, "search": SearchJob, "transfer": TransferJob}
KNOWN_PATHS = {kind: frozenset(known_paths(root)) for kind, root in KINDS.items()}
_TAGS = (("model", "arch", ("widths", "vote")), ("objective", "name", ("label_smoothing",)))

_COMMON: dict[Path, Any] = {
    ("name",): "name",
    ("data",): "digits",
    ("data", "train"): "digits",
    ("data", "expect", "train_samples"): 1797,
    ("data", "expect", "classes"): 10,
    ("data", "val", "from_train"): 0.5,
    ("objective",): {"name": "ce"},
    ("objective", "name"): "ce",
    ("train",): {"epochs": 1, "global_batch_size": 64, "lr": 1.0},
    ("train", "global_batch_size"): 64,
    ("train", "lr"): 1.0,
}
_OWN: dict[str, dict[Path, Any]] = {
    "train": {
        ("data", "image_size"): 64,
        ("model",): {"arch": "mlp", "widths": [8]},
        ("model", "arch"): "mlp",
        ("model", "widths"): [8],
    },
    "transfer": {("model",): {"backbone": "resnet18"}, ("model", "backbone"): "resnet18"},
}
STAND_INS: dict[str, dict[Path, Any]] = {
    **{kind: {("kind",): kind, **_COMMON, **own} for kind, own in _OWN.items()},
    "search": {
        ("kind",): "search",
        ("name",): "name",
        ("base",): {},
        ("space",): {"train.lr": {"choice": [1.0]}},
    },
}


def _within(path: Path, other: Path) -> bool:
    return path[: len(other)] == other


def touches(unusable: set[Path], needs: Sequence[str]) -> bool:
    """Whether a relation was computed from a value that is a stand-in."""
    wanted = [tuple(need.split(".")) for need in needs]
    return any(_within(path, need) or _within(need, path) for path in unusable for need in wanted)


def of_stand_in(unusable: set[Path], path: Path) -> bool:
    """Whether a problem may be one of the architecture or objective that stands in for an unknown one."""
    return any(
        (section, tag) in unusable and path[0] == section and path in KNOWN_PATHS["train"] and path[1] not in common
        for section, tag, common in _TAGS
    )


def drop(raw: Any, path: Path) -> None:
    """Take out the deepest mapping entry on the way to a path."""
    owner, last = None, None
    for key in path:
        if not isinstance(raw, dict):
            break
        if key not in raw:
            return
        owner, last, raw = raw, key, raw[key]
    if owner is not None and last is not None:
        del owner[last]


def kind_of(raw: dict[str, Any]) -> str:
    """The kind of a draft; where it names none, the one that its keys look like."""
    if raw.get("kind") in KINDS:
        return str(raw["kind"])
    if "base" in raw or "space" in raw:
        return "search"
    return "transfer" if isinstance(raw.get("model"), dict) and "backbone" in raw["model"] else "train"


def mend(raw: dict[str, Any], problem: Problem, stand_ins: dict[Path, Any]) -> None:
    """Make a draft more valid: leave out an unusable value, put a stand-in where one is required."""
    if not problem.missing and lookup(raw, problem.path[:1]) is not None:
        drop(raw, problem.path)
    elif not problem.missing:
        raw.pop(problem.path[0], None)
    for path in [problem.path[:n] for n in range(len(problem.path), 0, -1)]:
        if path in stand_ins and lookup(raw, path) is None:
            owner = lookup(raw, path[:-1])
            if isinstance(owner, dict):
                owner[path[-1]] = copy.deepcopy(stand_ins[path])
                return
