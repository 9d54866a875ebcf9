"""Contiguous ranges of layers and replicas of each that are best together: exact, by dynamic programming. Pure.

Shape letters: L layers, N workers, D choices of a number of replicas. `cost_LLD[a, b, d]` is what a stage of the
layers a .. b with `replicas[d]` workers costs; infinite where it may not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One stage: its layers (first and last, inclusive) and the index of its number of replicas."""

    first: int
    last: int
    option: int


@dataclass(frozen=True)
class _Row:
    """For every number of workers: the best value for the layers up to one, and its last stage."""

    value_N: Costs
    start_N: NDArray[np.int64]
    option_N: NDArray[np.int64]


def partition(
    cost_LLD: Costs,
    replicas: Sequence[int],
    workers: int,
    *,
    stages: Sequence[Sequence[int]] | None = None,
) -> list[Choice] | None:
    """Divide all layers so that the costliest stage costs as little as can be, with exactly `workers` workers.

    `stages` fixes the number of stages and, for each, the allowed options (indices into `replicas`); without it
    any number goes. Among equals the smallest sum of costs is taken. None where nothing fits.
    """
    slowest = _best(cost_LLD, replicas, workers, stages, np.maximum)
    if slowest is None:
        return None
    worst = max(float(cost_LLD[c.first, c.last, c.option]) for c in slowest)
    return _best(np.where(cost_LLD <= worst, cost_LLD, np.inf), replicas, workers, stages, np.add)


def reachable(cost_LLD: Costs, replicas: Sequence[int], most: int, number: int | None) -> list[int]:
    """Numbers of workers up to `most` that some division into `number` stages (None: any) uses up exactly."""
    every = range(len(replicas))
    tables = _tables(cost_LLD, replicas, most, None if number is None else [every] * number, np.maximum)
    return [n for n in range(1, most + 1) if np.isfinite(tables[-1][-1].value_N[n])]


def _best(
    cost_LLD: Costs,
    replicas: Sequence[int],
    workers: int,
    stages: Sequence[Sequence[int]] | None,
    combine: np.ufunc,
) -> list[Choice] | None:
    tables = _tables(cost_LLD, replicas, workers, stages, combine)
    layers = cost_LLD.shape[0]
    if not np.isfinite(tables[-1][layers].value_N[workers]):
        return None
    found: list[Choice] = []
    end, left, table = layers, workers, len(tables) - 1
    while end:
        row = tables[table][end]
        start, option = int(row.start_N[left]), int(row.option_N[left])
        found.append(Choice(start, end - 1, option))
        end, left = start, left - replicas[option]
        table = max(0, table - 1)
    return found[::-1]


def _tables(
    cost_LLD: Costs,
    replicas: Sequence[int],
    workers: int,
    stages: Sequence[Sequence[int]] | None,
    combine: np.ufunc,
) -> list[list[_Row]]:
    """Rows by number of layers done; one table for all numbers of stages, or one for each number up to that asked."""
    layers = cost_LLD.shape[0]
    every = range(len(replicas))
    if stages is None:
        rows = [_nothing_done(workers)]
        for end in range(1, layers + 1):
            rows.append(_extend(rows, cost_LLD[:end, end - 1], replicas, every, combine))
        return [rows]
    none = _unreachable(workers)
    tables = [[_nothing_done(workers), *[none] * layers]]
    for allowed in stages:
        before = tables[-1]
        rows = [none]
        for end in range(1, layers + 1):
            rows.append(_extend(before[:end], cost_LLD[:end, end - 1], replicas, allowed, combine))
        tables.append(rows)
    return tables


def _extend(
    before: Sequence[_Row],
    cost_LD: Costs,
    replicas: Sequence[int],
    allowed: Sequence[int],
    combine: np.ufunc,
) -> _Row:
    """The best last stage behind each of `before`; `cost_LD` by its first layer and its option."""
    value_LN = np.stack([row.value_N for row in before])
    made = _unreachable(value_LN.shape[1] - 1)
    for option in allowed:
        used = replicas[option]
        if used >= value_LN.shape[1]:
            continue
        candidate_LN = combine(value_LN[:, : value_LN.shape[1] - used], cost_LD[:, option, None])
        start_N = candidate_LN.argmin(axis=0)
        value_N = candidate_LN.min(axis=0)
        better = value_N < made.value_N[used:]
        made.value_N[used:][better] = value_N[better]
        made.start_N[used:][better] = start_N[better]
        made.option_N[used:][better] = option
    return made


def _unreachable(workers: int) -> _Row:
    zeros = np.zeros(workers + 1, dtype=np.int64)
    return _Row(np.full(workers + 1, np.inf), zeros, zeros.copy())


def _nothing_done(workers: int) -> _Row:
    row = _unreachable(workers)
    row.value_N[0] = 0.0
    return row
