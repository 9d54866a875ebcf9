"""The choice of ranges and replicas against all choices there are."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from orchestrator.pipeline.partition import partition, reachable


def every_division(
    layers: int, replicas: Sequence[int], workers: int, stages: Sequence[Sequence[int]] | None
) -> Iterator[list[tuple[int, int, int]]]:
    """All lists of (first, last, option) that cover the layers and use up the workers."""
    numbers = range(1, layers + 1) if stages is None else [len(stages)]
    for number in numbers:
        for cuts in itertools.combinations(range(1, layers), number - 1):
            borders = [0, *cuts, layers]
            allowed = stages or [range(len(replicas))] * number
            for options in itertools.product(*allowed):
                if len(borders) == number + 1 and sum(replicas[o] for o in options) == workers:
                    yield [(a, b - 1, o) for a, b, o in zip(borders, borders[1:], options, strict=False)]


@pytest.mark.parametrize("fixed", ["free", "number of stages", "replicas"])
def test_the_division_is_as_good_as_the_best_of_all(fixed: str) -> None:
    dice = random.Random(fixed)
    impossible = 0
    for _ in range(150):
        layers, workers = dice.randint(1, 5), dice.randint(1, 7)
        replicas = sorted(dice.sample([1, 2, 3, 4, 6], dice.randint(1, 4)))
        # Few different values: ties are decided by the sum. Some stages do not fit into memory.
        costs = np.array([dice.choice([1.0, 2.0, 3.0, 5.0, np.inf]) for _ in range(layers * layers * len(replicas))])
        cost = costs.reshape(layers, layers, len(replicas))
        number = dice.randint(1, layers)
        stages: list[list[int]] | None = None
        if fixed == "number of stages":
            stages = [list(range(len(replicas)))] * number
        elif fixed == "replicas":
            stages = [[dice.randrange(len(replicas))] for _ in range(number)]
        found = partition(cost, replicas, workers, stages=stages)
        values = [
            (max(parts), sum(parts))
            for division in every_division(layers, replicas, workers, stages)
            if np.isfinite(max(parts := [cost[d] for d in division]))
        ]
        if found is None:
            assert not values
            impossible += 1
            continue
        parts = [cost[c.first, c.last, c.option] for c in found]
        assert [i for c in found for i in range(c.first, c.last + 1)] == list(range(layers))
        assert sum(replicas[c.option] for c in found) == workers
        assert (max(parts), sum(parts)) == min(values)
    assert 0 < impossible < 150, "both outcomes are tried"


def test_numbers_of_workers_that_can_be_used_up_are_those_of_all_divisions() -> None:
    replicas, layers = [1, 4, 6], 3
    cost = np.ones((layers, layers, len(replicas)))
    for number in (None, 1, 2, 3):
        stages = None if number is None else [range(len(replicas))] * number
        expected = [n for n in range(1, 19) if any(True for _ in every_division(layers, replicas, n, stages))]
        assert reachable(cost, replicas, 18, number) == expected
