"""What a search may try: the values of trial i are a function of (seed, i) and the space, and of nothing else.

A space is a mapping from a job's key path to exactly one domain: `choice`, `uniform`, `loguniform`, `randint`,
`quniform` or `grid`; bounds belong to their domain. Pure functions on plain values; no torch, no Ray.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hff.randomness import derive_seed

Domain = Mapping[str, Sequence[Any]]
Space = Mapping[str, Domain]
Values = dict[str, Any]

FINITE = ("choice", "grid")
_DIGITS = 4


def kind_of(domain: Domain) -> str:
    """The name of a domain."""
    (kind,) = domain
    return str(kind)


def combinations(space: Space) -> int:
    """How many combinations a space of finite domains has."""
    return math.prod(len(domain[kind_of(domain)]) for domain in space.values())


def grid_values(space: Space, index: int) -> Values:
    """Combination `index` of a space of finite domains; the last path changes fastest."""
    values: Values = {}
    for path, domain in reversed(list(space.items())):
        choices = domain[kind_of(domain)]
        index, place = divmod(index, len(choices))
        values[path] = choices[place]
    return {path: values[path] for path in space}


def random_values(space: Space, seed: int, index: int) -> Values:
    """Values drawn independently for each path."""
    return {path: value_at(domain, _unit(seed, path, index)) for path, domain in space.items()}


def _unit(seed: int, path: str, index: int) -> float:
    """A number in [0, 1)."""
    return float(derive_seed(seed, "search", path, index) >> 10) / 2.0**53


def value_at(domain: Domain, u: float) -> Any:
    """The value at the share 0 <= u < 1 of a domain."""
    kind = kind_of(domain)
    if kind in FINITE:
        choices = domain[kind]
        return choices[int(u * len(choices))]
    low, high = domain[kind][:2]
    if kind == "randint":
        return int(low) + int(u * (int(high) - int(low) + 1))
    if kind == "loguniform":
        return shortened(math.exp(math.log(low) + u * (math.log(high) - math.log(low))), low, high)
    if kind == "quniform":
        return quantised(low + u * (high - low), domain[kind])
    return shortened(low + u * (high - low), low, high)


def shortened(number: float, low: float, high: float) -> float:
    """Rounded to four figures within the bounds: a job file is for reading, and the fifth decides nothing."""
    return min(max(float(f"{number:.{_DIGITS}g}"), float(low)), float(high))


def quantised(number: float, bounds: Sequence[float]) -> float | int:
    """The nearest of low, low + step, ... up to high; a whole number where low and step are whole."""
    low, high, step = bounds
    last = math.floor((high - low) / step + 1e-9)
    value = low + min(max(round((number - low) / step), 0), last) * step
    whole = float(low).is_integer() and float(step).is_integer()
    return int(value) if whole else float(f"{value:.12g}")


def extremes(domain: Domain) -> list[Any]:
    """The values that stand for a domain when a job is checked: every choice, or both ends."""
    kind = kind_of(domain)
    if kind in FINITE:
        return list(domain[kind])
    low, high = domain[kind][:2]
    return [quantised(low, domain[kind]), quantised(high, domain[kind])] if kind == "quniform" else [low, high]


def with_values(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a job with others at some key paths; `base` stays as it is."""
    job: dict[str, Any] = copy.deepcopy(dict(base))
    for path, value in values.items():
        *sections, key = path.split(".")
        owner = job
        for name in sections:
            owner = owner[name]
        owner[key] = value
    return job
