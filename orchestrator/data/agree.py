"""Whether the data sets of a job are there, and agree with one another and with what the job states of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.index import Index, open_index
from orchestrator.data.packing.labels import some
from orchestrator.errors import DataError
from orchestrator.job import paths

Finding = tuple[str, str]
_SETS = ("train", "val", "test")


@dataclass(frozen=True)
class Look:
    """What a look at the folders of a job found, each with its key: sets that are not there, and what is wrong."""

    missing: tuple[Finding, ...]
    wrong: tuple[Finding, ...]


def look(data: Mapping[str, Any]) -> Look:
    """Look at the local sets of a resolved data section, at their indexes alone; URLs are not asked."""
    indexes: dict[str, Index] = {}
    missing: list[Finding] = []
    wrong: list[Finding] = []
    for key in _SETS:
        place = data[key]
        if not isinstance(place, str) or place == paths.DIGITS or paths.is_remote(place):
            continue
        try:
            indexes[key] = open_index(place)
        except DataError as error:
            found = (f"data.{key}", str(error))
            (wrong if (Path(place) / "index.json").exists() else missing).append(found)
    return Look(tuple(missing), (*wrong, *disagreements(data, indexes)))


def open_all(data: Mapping[str, Any], open_one: Callable[[str], Index]) -> dict[str, Index]:
    """The index of each of `train`, `val` and `test` that is a place; `open_one` opens the one of a place.

    Raises DataError with all that cannot be opened, and with all that disagrees.
    """
    indexes: dict[str, Index] = {}
    wrong = []
    for key in _SETS:
        if not isinstance(data[key], str):
            continue
        try:
            indexes[key] = open_one(data[key])
        except DataError as error:
            wrong.append((f"data.{key}", str(error)))
    wrong += [] if wrong else disagreements(data, indexes)
    if wrong:
        raise DataError(findings=wrong)
    return indexes


def disagreements(data: Mapping[str, Any], indexes: Mapping[str, Index]) -> list[Finding]:
    """Classes that differ between sets, and numbers that are not those of `data.expect`."""
    train, found = indexes.get("train"), []
    for key in ("val", "test"):
        other = indexes.get(key)
        if train is not None and other is not None and other.classes != train.classes:
            text = _differing(train, other)
            found.append((f"data.{key}", text))
    counted = {
        "train_samples": None if train is None else train.num_samples,
        "val_samples": indexes["val"].num_samples if "val" in indexes else None,
        "classes": None if train is None else len(train.classes),
    }
    for key, number in counted.items():
        stated = (data["expect"] or {}).get(key)
        if stated is not None and number is not None and stated != number:
            text = f"the job states {stated}, the index has {number}; correct it, or delete data.expect"
            found.append((f"data.expect.{key}", text))
    return found


def _differing(train: Index, other: Index) -> str:
    """How the classes of a set differ from those of the training set, and what to do."""
    missing = sorted(set(train.classes) - set(other.classes))
    extra = sorted(set(other.classes) - set(train.classes))
    parts = [f"{_are(missing)} missing ({some(missing, most=3)})"] if missing else []
    parts += [f"{_are(extra)} not in data.train ({some(extra, most=3)})"] if extra else []
    classes = train.folder if train.store is None else "TRAIN"
    remedy = "leave those out and " if extra else ""
    return (
        f"its classes differ from those of data.train ({len(other.classes)} against {len(train.classes)}): "
        f"{', '.join(parts) or 'the same in another order'}; {remedy}pack it again with --classes {classes}"
    )


def _are(names: Sequence[str]) -> str:
    return f"{len(names)} {'is' if len(names) == 1 else 'are'}"
