"""Learning rates against their formulas, step by step."""

from __future__ import annotations

import math

import pytest

from hff import learning_rate


def rates(schedule: str, warmup_steps: int = 0, steps: int = 100) -> list[float]:
    return [learning_rate(s, steps, base_lr=2.0, schedule=schedule, warmup_steps=warmup_steps) for s in range(steps)]


def half_cosine(steps: int) -> list[float]:
    """From 2 to just above 0."""
    return [1 + math.cos(math.pi * step / steps) for step in range(steps)]


def rise(steps: int) -> list[float]:
    """Linear, to 2."""
    return [2 * (step + 1) / steps for step in range(steps)]


def test_constant_stays_behind_its_warm_up() -> None:
    assert rates("constant") == [2.0] * 100
    assert rates("constant", 4) == pytest.approx([0.5, 1.0, 1.5, 2.0, *[2.0] * 96])


@pytest.mark.parametrize("warmup_steps", [0, 1, 30, 100])
def test_cosine_falls_to_zero_from_the_end_of_its_warm_up(warmup_steps: int) -> None:
    assert rates("cosine", warmup_steps) == pytest.approx(rise(warmup_steps) + half_cosine(100 - warmup_steps))


def test_one_cycle_rises_for_a_seventh_of_the_steps_or_for_its_warm_up() -> None:
    assert rates("one-cycle") == pytest.approx(rise(15) + half_cosine(85))
    assert rates("one-cycle", 30) == pytest.approx(rise(30) + half_cosine(70))
    assert rates("one-cycle", steps=2) == pytest.approx([2.0, 2.0]), "one step at least"


def test_an_unknown_schedule_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="constant, cosine, one-cycle"):
        learning_rate(0, 1, base_lr=1.0, schedule="linear")
