"""How much each value of a space explains of the metric, from the trials that were made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.job.space import FINITE, Space, kind_of
from orchestrator.search.record import Trial

LEAST_TRIALS = 4
_TREES = 200


def position(domain: Mapping[str, Sequence[Any]], value: Any) -> float:
    """Where a value lies in its domain, from 0 to 1; on a logarithmic scale where the domain is logarithmic."""
    kind = kind_of(domain)
    if kind in FINITE:
        choices = list(domain[kind])
        return choices.index(value) / max(1, len(choices) - 1)
    low, high = domain[kind][:2]
    if kind == "loguniform":
        return math.log(value / low) / math.log(high / low)
    return float((value - low) / (high - low))


def importance(space: Space, trials: Sequence[Trial]) -> dict[str, float]:
    """The share of each path in the variance of the metric, from a random forest over the measured trials.

    Empty where that says nothing: with fewer than four trials or with one path. Shares add up to 1.
    """
    measured = [trial for trial in trials if trial.metric is not None]
    if len(measured) < LEAST_TRIALS or len(space) < 2:
        return {}
    from sklearn.ensemble import RandomForestRegressor

    rows = [[position(domain, trial.values[path]) for path, domain in space.items()] for trial in measured]
    forest = RandomForestRegressor(n_estimators=_TREES, random_state=0)
    forest.fit(rows, [trial.metric for trial in measured])
    return {path: float(share) for path, share in zip(space, forest.feature_importances_, strict=True)}
