"""The record of a search: every trial with its values, its curve and its end. What is in it is never tried again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

ENDED = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Trial:
    """One trial. `status` is running (also when the search was killed), finished, stopped or failed.

    `curve` has one (epoch, metric) per evaluated epoch; `metric` is that of the final weights, or the last of the
    curve for a stopped trial. `seconds` is the time of the training loop spent by this trial alone. `layer` and
    `parent` (whose checkpoint it was forked from) belong to the layerwise strategy.
    """

    index: int
    name: str
    values: dict[str, Any]
    status: str = "running"
    layer: int | None = None
    parent: int | None = None
    curve: tuple[tuple[int, float], ...] = ()
    metric: float | None = None
    seconds: float | None = None
    run_id: str | None = None
    message: str | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def with_result(self, epoch: int, metric: float) -> Trial:
        """The trial with one more point of its curve; an epoch that is done again replaces the earlier one."""
        kept = tuple(point for point in self.curve if point[0] < epoch)
        return replace(self, curve=(*kept, (epoch, metric)))


def trial_name(search: str, index: int) -> str:
    """The name of the run of a trial."""
    return f"{search}-{index:03d}"


def to_json(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    return [asdict(trial) for trial in trials]


def from_json(values: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """The trials of a record that was read from its file."""
    return [Trial(**{**v, "curve": tuple((int(e), float(m)) for e, m in v["curve"])}) for v in values]


def best(trials: Sequence[Trial], sign: int) -> Trial | None:
    """The finished trial with the best metric, the earliest of equals; None when none has finished."""
    finished = [t for t in trials if t.status == "finished" and t.metric is not None]
    return max(finished, key=lambda t: (sign * (t.metric or 0.0), -t.index), default=None)


def counts(trials: Sequence[Trial]) -> dict[str, int]:
    """How many trials ended in which way."""
    return {status: sum(t.status == status for t in trials) for status in ("running", *ENDED)}


def total_seconds(trials: Sequence[Trial]) -> float:
    """Seconds of all training loops together: what the search cost, wherever it ran."""
    return sum(t.seconds or 0.0 for t in trials)
