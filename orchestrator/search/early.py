"""Which trials go on: decisions over the curves of all trials, those of an earlier session included.

A curve is a list of (epoch, metric) with rising epochs. Being functions of the curves alone, the rules need no state:
a search that was stopped and started again decides with everything that it has measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Curve = Sequence[tuple[int, float]]

_MEDIAN_LEAST = 3


def newest_rung(before: int, epoch: int, grace_epochs: int, factor: int) -> int | None:
    """The highest of the epochs grace, grace x factor, ... that lies in (before, epoch]; None without one."""
    found = None
    rung = grace_epochs
    while rung <= epoch:
        found = rung if rung > before else None
        rung *= factor
    return found


def asha_stops(curve: Curve, others: Sequence[Curve], *, grace_epochs: int, factor: int, sign: int) -> bool:
    """Whether a trial that has just got its newest metric ends here (Li et al. 2020, arXiv 1810.05934).

    At a rung it goes on when it is among the best 1 / factor of those that came to this rung before; the first one
    always does. `sign` is 1 where more is better and -1 where less is.
    """
    epoch, value = curve[-1]
    rung = newest_rung(curve[-2][0] if len(curve) > 1 else 0, epoch, grace_epochs, factor)
    if rung is None:
        return False
    there = [sign * v for other in others if (v := at_rung(other, rung)) is not None]
    return bool(there) and sign * value < _quantile(there, 1 - 1 / factor)


def at_rung(curve: Curve, rung: int) -> float | None:
    """The first metric at or after the epoch of a rung; None for a trial that has not come so far."""
    return next((value for epoch, value in curve if epoch >= rung), None)


def median_stops(curve: Curve, others: Sequence[Curve], *, grace_epochs: int, sign: int) -> bool:
    """Whether the best metric of a trial is worse than the median of the others' running means.

    The rule of Vizier (Golovin et al. 2017, section 3.2.2), once three others have come as far.
    """
    epoch = curve[-1][0]
    if epoch < grace_epochs:
        return False
    means = []
    for other in others:
        seen = [sign * v for e, v in other if grace_epochs <= e <= epoch]
        if seen and other[-1][0] >= epoch:
            means.append(statistics.fmean(seen))
    if len(means) < _MEDIAN_LEAST:
        return False
    return max(sign * v for _, v in curve) < statistics.median(means)


def _quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
