"""What each step of a run does, known before its first."""

from __future__ import annotations

import pytest

from hff import learning_rate
from orchestrator.run.schedule import make_schedule

TRAIN = {
    "epochs": 3, "steps": None, "samples": None, "global_batch_size": 10, "schedule": "simultaneous", "lr": 1.0,
    "lr_schedule": "constant", "warmup_epochs": None, "warmup_steps": None, "eval_every_epochs": 2,
}  # fmt: skip
SAVING = {"every_steps": 4, "every_epochs": 1, "keep_last": 2}


def test_a_schedule_says_what_every_step_does() -> None:
    schedule = make_schedule(TRAIN, SAVING, steps_per_epoch=5, layers=3)
    assert (schedule.total_steps, schedule.epochs) == (15, 3)
    assert [n for n in range(1, 16) if schedule.saves(n)] == [4, 5, 8, 10, 12, 15]
    assert [n for n in range(1, 16) if schedule.ends_epoch(n)] == [5, 10, 15]
    assert [n for n in range(1, 16) if schedule.evaluates(n)] == [10]
    assert schedule.trained(7) is None
    by_samples = make_schedule({**TRAIN, "epochs": None, "samples": 41}, SAVING, steps_per_epoch=5, layers=3)
    assert by_samples.total_steps == 5


@pytest.mark.parametrize(
    ("warm_up", "steps"),
    [({}, 0), ({"warmup_steps": 3}, 3), ({"warmup_epochs": 1.5}, 8)],
    ids=["none", "steps", "epochs"],
)
@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_the_rate_follows_its_curve_anew_in_every_phase(schedule: str, warm_up: dict[str, float], steps: int) -> None:
    train = {**TRAIN, "schedule": "sequential", "lr_schedule": schedule, **warm_up}
    made = make_schedule(train, SAVING, steps_per_epoch=5, layers=2, per_layer=[{"lr": 0.5}, None])
    for layer, rate in ((0, 0.5), (1, 1.0)):
        curve = [learning_rate(n, 15, base_lr=rate, schedule=schedule, warmup_steps=steps) for n in range(15)]
        assert [made.learning_rate(n, layer) for n in range(30)] == [*curve, *curve]


def test_the_last_step_ends_an_epoch_saves_and_is_evaluated_apart() -> None:
    schedule = make_schedule({**TRAIN, "epochs": None, "steps": 12}, SAVING, steps_per_epoch=5, layers=3)
    assert schedule.epochs == 3
    assert [n for n in range(1, 13) if schedule.ends_epoch(n)] == [5, 10, 12]
    assert schedule.saves(12)
    whole = make_schedule({**TRAIN, "epochs": 2}, {**SAVING, "every_epochs": 9}, steps_per_epoch=5, layers=3)
    assert [n for n in range(1, 11) if whole.saves(n)] == [4, 8, 10]
    assert not any(map(whole.evaluates, range(1, 11)))


def test_a_sequential_schedule_trains_one_layer_at_a_time() -> None:
    schedule = make_schedule({**TRAIN, "schedule": "sequential"}, SAVING, steps_per_epoch=5, layers=2)
    assert schedule.total_steps == 30
    assert [schedule.trained(step) for step in (0, 14, 15, 29)] == [0, 0, 1, 1]
    assert [schedule.depth(done, 2) for done in (5, 15, 16, 30)] == [1, 1, 2, 2]
