"""What a search may try: the values of trial i are a function of (seed, i) and the space, and of nothing else.

A space is a mapping from a job's key path to exactly one of `choice`, `uniform`, `loguniform`, `randint`,
`quniform` and `grid`. Pure functions on plain values; no torch, no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hff.randomness import derive_seed

Dimension = Mapping[str, Any]
Space = Mapping[str, Dimension]
Values = dict[str, Any]

_DIGITS = 4


def kind_of(dimension: Dimension) -> str:
    """The name of the distribution of one path."""
    (kind,) = dimension
    return str(kind)


def combinations(space: Space) -> int:
    """How many trials it takes to try every combination of the `grid` paths once; 1 without any."""
    return math.prod(len(d["grid"]) for d in space.values() if "grid" in d)


def trial_values(space: Space, seed: int, index: int) -> Values:
    """The values of trial `index`: combination `index` of the grids, the other paths drawn from (seed, index)."""
    values: Values = {}
    place = index % combinations(space)
    for path, dimension in space.items():
        if "grid" in dimension:
            place, choice = divmod(place, len(dimension["grid"]))
            values[path] = dimension["grid"][choice]
        else:
            values[path] = _drawn(dimension, _unit(seed, path, index))
    return values


def _unit(seed: int, path: str, index: int) -> float:
    """A number in [0, 1)."""
    return float(derive_seed(seed, "search", path, index) >> 10) / 2.0**53


def _drawn(dimension: Dimension, u: float) -> Any:
    """The value at the share `u` of a distribution."""
    kind = kind_of(dimension)
    if kind == "choice":
        choices = dimension["choice"]
        return choices[int(u * len(choices))]
    low, high = dimension[kind][:2]
    if kind == "randint":
        return int(low) + int(u * (int(high) - int(low) + 1))
    if kind == "loguniform":
        return _short(math.exp(math.log(low) + u * (math.log(high) - math.log(low))), low, high)
    if kind == "quniform":
        return quantised(low + u * (high - low), *dimension["quniform"])
    return _short(low + u * (high - low), low, high)


def _short(number: float, low: float, high: float) -> float:
    """Rounded to four figures: a job file is for reading, and the fifth decides nothing."""
    rounded = float(f"{number:.{_DIGITS}g}")
    return min(max(rounded, float(low)), float(high))


def quantised(number: float, low: float, high: float, step: float) -> float | int:
    """The nearest of low, low + step, ... up to high; whole where low and step are whole."""
    last = math.floor((high - low) / step + 1e-9)
    place = min(max(round((number - low) / step), 0), last)
    if isinstance(low, int) and isinstance(step, int):
        return low + place * step
    return float(f"{low + place * step:.12g}")


def extremes(dimension: Dimension) -> Sequence[Any]:
    """The values that stand for all of a dimension when a job is checked: every choice, or both ends."""
    kind = kind_of(dimension)
    if kind in ("choice", "grid"):
        return list(dimension[kind])
    low, high = dimension[kind][:2]
    if kind == "quniform":
        step = dimension[kind][2]
        return [quantised(low, low, high, step), quantised(high, low, high, step)]
    return [low, high] if kind == "randint" else [float(low), float(high)]
