"""Which trials go on, against Ray Tune's own schedulers on random curves."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import MedianStoppingRule, TrialScheduler
from ray.tune.schedulers.async_hyperband import _Bracket

from orchestrator.search.early import asha_stops, at_rung, median_stops, newest_rung

EPOCHS = 27


def in_turns(rng: random.Random, trials: int) -> list[tuple[int, int]]:
    """(trial, epoch) in an order in which trials overtake one another."""
    left = [t for t in range(trials) for _ in range(EPOCHS)]
    rng.shuffle(left)
    reached = [0] * trials
    order = []
    for trial in left:
        reached[trial] += 1
        order.append((trial, reached[trial]))
    return order


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", ["max", "min"])
def test_successive_halving_decides_like_ray_tunes_asha(seed: int, mode: str) -> None:
    rng, sign = random.Random(seed), 1 if mode == "max" else -1
    grace, factor = rng.choice([1, 2, 3]), rng.choice([2, 3, 4])
    reference = _Bracket(grace, EPOCHS, factor, 0)
    curves: list[list[tuple[int, float]]] = [[] for _ in range(8)]
    stopped: set[int] = set()
    for trial, epoch in in_turns(rng, len(curves)):
        if trial in stopped:
            continue
        value = rng.random()
        curves[trial].append((epoch, value))
        others = [c for i, c in enumerate(curves) if i != trial and c]
        mine = asha_stops(curves[trial], others, grace_epochs=grace, factor=factor, sign=sign)
        theirs = reference.on_result(SimpleNamespace(trial_id=trial), epoch, sign * value)
        assert mine == (theirs == TrialScheduler.STOP), (trial, epoch)
        stopped |= {trial} if mine else set()
    assert stopped


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_median_rule_decides_like_ray_tunes(mode: str) -> None:
    rng, sign = random.Random(3), 1 if mode == "max" else -1
    reference = MedianStoppingRule(time_attr="epoch", metric="m", mode=mode, grace_period=2, min_samples_required=3)
    curves: list[list[tuple[int, float]]] = [[] for _ in range(8)]
    names = [SimpleNamespace(trial_id=str(i), status="RUNNING") for i in range(8)]
    names = [type("T", (), vars(n))() for n in names]
    controller = SimpleNamespace(get_live_trials=list)
    stopped: set[int] = set()
    for trial, epoch in in_turns(rng, len(curves)):
        if trial in stopped:
            continue
        value = rng.gauss(trial * 0.1, 0.2)
        curves[trial].append((epoch, value))
        others = [c for i, c in enumerate(curves) if i != trial and c]
        mine = median_stops(curves[trial], others, grace_epochs=2, sign=sign)
        theirs = reference.on_trial_result(controller, names[trial], {"epoch": epoch, "m": value})
        assert mine == (theirs == TrialScheduler.STOP), (trial, epoch)
        stopped |= {trial} if mine else set()
    assert stopped


def test_the_first_trial_at_a_rung_always_goes_on() -> None:
    assert not asha_stops([(1, 0.0)], [], grace_epochs=1, factor=3, sign=1)
    assert not asha_stops([(1, 0.0)], [[(2, 0.9)]], grace_epochs=3, factor=3, sign=1)


def test_a_trial_below_the_best_share_of_a_rung_is_stopped() -> None:
    others = [[(1, v)] for v in (0.1, 0.5, 0.9)]
    cutoff = float(np.percentile([0.1, 0.5, 0.9], 100 * (1 - 1 / 2)))
    assert asha_stops([(1, cutoff - 0.01)], others, grace_epochs=1, factor=2, sign=1)
    assert not asha_stops([(1, cutoff)], others, grace_epochs=1, factor=2, sign=1)


def test_a_rung_between_two_evaluations_counts_at_the_later_one() -> None:
    assert newest_rung(2, 4, 3, 3) == 3
    assert newest_rung(4, 8, 3, 3) is None
    assert newest_rung(0, 9, 3, 3) == 9
    assert at_rung([(2, 0.1), (4, 0.2)], 3) == 0.2
    assert at_rung([(2, 0.1)], 3) is None
