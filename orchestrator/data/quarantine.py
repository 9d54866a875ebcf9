"""Samples that are known to be bad: named in a file beside the index, left out of training, counted as skipped."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from orchestrator.data.images.decode import Fault
from orchestrator.data.index import Index
from orchestrator.errors import DataError
from orchestrator.storage import write_atomically

FILE = "quarantine.json"


class Quarantined(Fault):
    """Why a sample is left out, told beforehand: it does not use up the budget for bad samples."""

    reason = f"in {FILE}"


def write_quarantine(index: Index, reasons: Mapping[str, str]) -> None:
    """Name samples, by key, that training is to leave out, and why. Replaces what was named before."""
    content = {"index_sha256": index.sha256, "samples": dict(sorted(reasons.items()))}
    write_atomically(index.folder / FILE, json.dumps(content, indent=1) + "\n")


def read_reasons(index: Index) -> dict[str, str]:
    """Why, by key; empty without a list. Raises DataError for the list of another index."""
    file = index.folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        of, reasons = content["index_sha256"], {str(key): str(why) for key, why in content["samples"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: cannot be read as a quarantine list: {type(error).__name__}: {error}") from None
    if of != index.sha256:
        raise DataError(f"{file}: belongs to another index; remove it, then: orchestrator data verify --fix ...")
    return reasons


def quarantined(index: Index) -> dict[int, Quarantined]:
    """Why, by the number of the sample in the index. Raises DataError for a key that the index has not."""
    reasons = read_reasons(index)
    if not reasons:
        return {}
    rows = np.flatnonzero(np.isin(index.members["key"], [key.encode() for key in reasons])).tolist()
    keys = index.keys(rows)
    unknown = sorted(set(reasons) - set(keys))
    if unknown:
        raise DataError(f"{index.folder / FILE}: key {unknown[0]} is not in the index")
    return {i: Quarantined(f"in {FILE}: {reasons[key]}") for i, key in zip(rows, keys, strict=True)}
