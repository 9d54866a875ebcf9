"""What a search may try: determinism, bounds, distributions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from orchestrator.job.space import (
    combinations,
    extremes,
    grid_values,
    quantised,
    random_values,
    value_at,
    with_values,
)

SPACE: dict[str, dict[str, Any]] = {
    "train.lr": {"loguniform": (1e-4, 1e-1)},
    "objective.margin": {"uniform": (0.0, 0.3)},
    "train.global_batch_size": {"randint": (3, 5)},
    "model.dropout": {"quniform": (0.0, 0.5, 0.05)},
    "train.optimizer": {"choice": ("adamw", "sgd")},
}


def test_the_values_of_a_trial_depend_on_the_seed_and_its_index_alone() -> None:
    alone = random_values(SPACE, 7, 5)
    torch.manual_seed(0)
    assert [random_values(SPACE, 7, i) for i in range(9)][5] == alone
    assert random_values(SPACE, 8, 5) != alone
    assert random_values(dict(reversed(SPACE.items())), 7, 5) == alone
    assert random_values({"train.lr": SPACE["train.lr"]}, 7, 5)["train.lr"] == alone["train.lr"]


def test_drawn_values_fill_their_domain_and_stay_in_it() -> None:
    drawn = [random_values(SPACE, 0, i) for i in range(2000)]
    rates = [v["train.lr"] for v in drawn]
    assert 1e-4 <= min(rates) < 1.2e-4
    assert 0.085 < max(rates) <= 0.1
    middle = sorted(math.log10(r) for r in rates)[1000]
    assert middle == pytest.approx(-2.5, abs=0.1), "half of them lie below the geometric mean"
    assert {v["train.global_batch_size"] for v in drawn} == {3, 4, 5}
    assert {v["train.optimizer"] for v in drawn} == {"adamw", "sgd"}
    assert {v["model.dropout"] for v in drawn} == {round(0.05 * n, 2) for n in range(11)}
    assert sum(v["objective.margin"] for v in drawn) / 2000 == pytest.approx(0.15, abs=0.01)


def test_both_bounds_belong_to_a_domain() -> None:
    almost = 1 - 2**-53
    for domain in SPACE.values():
        ends = extremes(domain)
        assert value_at(domain, 0.0) == ends[0]
        assert value_at(domain, almost) == pytest.approx(ends[-1])
    assert value_at({"randint": (3, 5)}, almost) == 5


def test_a_whole_grid_of_steps_gives_whole_numbers() -> None:
    assert quantised(17.0, (8.0, 64.0, 8.0)) == 16
    assert type(quantised(17.0, (8.0, 64.0, 8.0))) is int
    assert quantised(1.0, (0.0, 1.0, 0.3)) == 0.9
    assert quantised(9.0, (0.1, 0.7, 0.2)) == 0.7


def test_a_grid_is_every_combination_once() -> None:
    space = {"a": {"grid": (1, 2)}, "b": {"choice": ("x", "y", "z")}}
    found = [tuple(grid_values(space, i).values()) for i in range(combinations(space))]
    assert found == list(itertools.product((1, 2), "xyz"))


def test_values_are_put_into_a_copy_of_the_base() -> None:
    base = {"train": {"lr": 1.0, "seed": 0}, "objective": {"name": "hff"}}
    job = with_values(base, {"train.lr": 0.5, "objective": {"name": "ce"}})
    assert job == {"train": {"lr": 0.5, "seed": 0}, "objective": {"name": "ce"}}
    assert base["train"] == {"lr": 1.0, "seed": 0}
