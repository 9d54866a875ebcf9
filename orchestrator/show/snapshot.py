"""Where a run is at one moment, as plain values that travel as one line of text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

# The ASCII record separator: no line that is meant for people begins with it.
_MARK = "\x1e"


@dataclass(frozen=True)
class StageShare:
    """What one stage does with its time; fractions of it. `name` says which layers it has."""

    name: str
    busy: float
    wait_input: float
    wait_output: float
    all_reduce: float


@dataclass(frozen=True)
class Snapshot:
    """Progress of a run. Steps of all epochs; None where nothing is known yet; `best` names a layer and its top-1."""

    step: int
    steps_total: int
    phase: str
    images_per_second: float | None = None
    seconds_left: float | None = None
    best: str = ""
    stages: tuple[StageShare, ...] = ()

    def to_record(self) -> str:
        """One line that `from_record` reads."""
        return _MARK + json.dumps(asdict(self))


def from_record(line: str) -> Snapshot | None:
    """The snapshot of a line; None for a line that is text, or that a newer version wrote."""
    if not line.startswith(_MARK):
        return None
    try:
        values: dict[str, Any] = json.loads(line[len(_MARK) :])
        return Snapshot(**{**values, "stages": tuple(StageShare(**stage) for stage in values["stages"])})
    except (ValueError, TypeError, KeyError):
        return None
