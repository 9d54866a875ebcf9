"""The record of a search, the layerwise order, the fit into a cluster, importance and TPE: all without Ray."""

from __future__ import annotations

import json
import random
import statistics
import sys
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import JobError, OrchestratorError
from orchestrator.job.space import random_values
from orchestrator.search import fit, layerwise, record, tpe
from orchestrator.search.importance import importance, position
from orchestrator.search.record import Trial

CLUSTER = {"launcher": "ray", "workers": 1, "cpus_per_worker": 0.9, "use_gpu": False}


def trial(index: int, status: str = "finished", metric: float | None = None, **more: Any) -> Trial:
    return Trial(index, f"s-{index:03d}", more.pop("values", {"train.lr": 0.1}), status=status, metric=metric, **more)


def test_a_record_survives_its_file() -> None:
    trials = [trial(0, metric=0.5, curve=((1, 0.25), (2, 0.5))), trial(1, "failed", message="no", layer=1, parent=0)]
    assert record.from_json(json.loads(json.dumps(record.to_json(trials)))) == trials


def test_an_epoch_done_again_replaces_what_came_after_it() -> None:
    seen = trial(0, "running").with_result(1, 0.1).with_result(2, 0.2).with_result(3, 0.3)
    assert seen.with_result(2, 0.25).curve == ((1, 0.1), (2, 0.25))


def test_the_best_trial_is_a_finished_one_and_the_earliest_of_equals() -> None:
    trials = [trial(0, metric=0.5), trial(1, "stopped", 0.9), trial(2, metric=0.7), trial(3, metric=0.7)]
    assert record.best(trials, 1) == trials[2]
    assert record.best(trials, -1) == trials[0]
    assert record.best(trials[1:2], 1) is None


def test_layers_are_settled_one_after_the_other() -> None:
    """Two candidates per layer, three layers; the loop of a search with nothing but decisions."""
    trials: list[Trial] = []
    accuracy = {0: 0.5, 1: 0.6, 2: 0.9, 3: 0.8, 4: 0.7, 5: 0.95}
    started: list[tuple[int, int | None]] = []
    while (index := layerwise.next_index(trials, 2, 3, 1)) is not None:
        layer = layerwise.layer_of(index, 2)
        settled = layerwise.winner(trials, layer - 1, 1)
        parent = None if settled is None else settled.index
        started.append((layer, parent))
        running = trial(index, "running", layer=layer, parent=parent, values={"train.lr": float(index)})
        trials.append(running)
        if index % 2 == 0:
            assert layerwise.next_index(trials, 2, 3, 1) == index + 1, "candidates of a layer run side by side"
        else:
            assert layerwise.next_index(trials, 2, 3, 1) is None, "the next layer waits for all of them"
            for i in (index - 1, index):
                trials[i] = replace(trials[i], status="finished", metric=accuracy[i])
    assert started == [(0, None), (0, None), (1, 1), (1, 1), (2, 2), (2, 2)]
    best = layerwise.winner(trials, 2, 1)
    assert best is not None
    assert layerwise.per_layer(trials, best) == [{"lr": 1.0}, {"lr": 2.0}, {"lr": 5.0}]


def test_a_layer_without_a_finished_candidate_ends_the_search() -> None:
    trials = [trial(0, "failed", layer=0), trial(1, "stopped", 0.3, layer=0)]
    assert layerwise.next_index(trials, 2, 3, 1) is None
    assert layerwise.failed_layer(trials, 2) == 0
    assert layerwise.failed_layer(trials[:1], 2) is None


@pytest.mark.parametrize(
    ("workers", "cpus_per_worker", "cpus", "expected"),
    [(1, 0.9, 2.0, 2), (2, 0.9, 2.0, 1), (1, 1.0, 2.0, 1), (4, 1.0, 64.0, 15), (1, 0.4, 1.0, 2)],
)
def test_as_many_trials_run_at_a_time_as_the_cluster_holds_with_their_drivers(
    workers: int, cpus_per_worker: float, cpus: float, expected: int
) -> None:
    need = fit.need_of({**CLUSTER, "workers": workers, "cpus_per_worker": cpus_per_worker})
    assert fit.concurrency(need, cpus, 0.0, "auto", "x") == expected
    assert expected * need.cpus <= cpus < (expected + 1) * need.cpus


def test_without_ray_workers_the_driver_is_the_one_that_computes() -> None:
    need = fit.need_of({**CLUSTER, "launcher": "process", "cpus_per_worker": 1.0})
    assert fit.concurrency(need, 2.0, 0.0, "auto", "x") == 2


def test_a_trial_larger_than_the_cluster_is_refused_with_the_sum() -> None:
    need = fit.need_of({**CLUSTER, "workers": 2, "cpus_per_worker": 1.0})
    with pytest.raises(JobError) as caught:
        fit.concurrency(need, 2.0, 0.0, "auto", "this machine")
    assert str(caught.value) == (
        "base.cluster: one trial must fit into this machine, which has 2 CPU, got 2.1 CPU (0.1 for its driver + "
        "2 x 1 for its workers); use fewer workers or lower base.cluster.cpus_per_worker"
    )
    need = fit.need_of({**CLUSTER, "workers": 4, "use_gpu": True})
    with pytest.raises(JobError) as caught:
        fit.concurrency(need, 64.0, 2.0, "auto", "the Ray cluster")
    assert str(caught.value) == (
        "base.cluster: one trial must fit into the Ray cluster, which has 2 GPU, got 4 for its workers; "
        "use fewer workers"
    )


def test_more_trials_at_a_time_than_fit_are_refused() -> None:
    need = fit.need_of(CLUSTER)
    assert fit.concurrency(need, 4.0, 0.0, 3, "x") == 3
    with pytest.raises(JobError) as caught:
        fit.concurrency(need, 2.0, 0.0, 3, "this machine")
    assert str(caught.value) == (
        "concurrency: must be at most 2, got 3: a trial needs 1 CPU (0.1 for its driver + 1 x 0.9 for its workers) "
        "and this machine has 2 CPU"
    )


def test_the_value_that_decides_gets_the_importance() -> None:
    space: dict[str, Any] = {"a": {"uniform": (0.0, 1.0)}, "b": {"loguniform": (1e-4, 1.0)}, "c": {"choice": (1, 2)}}
    rng = random.Random(0)
    trials = []
    for i in range(30):
        values = {"a": rng.random(), "b": 10 ** rng.uniform(-4, 0), "c": rng.choice((1, 2))}
        trials.append(trial(i, metric=position(space["b"], values["b"]) + 0.05 * values["a"], values=values))
    shares = importance(space, trials)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["b"] > 0.9
    assert importance(space, trials[:3]) == {}


def test_tpe_looks_where_trials_were_good() -> None:
    pytest.importorskip("optuna")
    space: dict[str, Any] = {"a": {"uniform": (0.0, 1.0)}, "b": {"choice": ("x", "y")}, "c": {"randint": (1, 9)}}

    def gain(values: dict[str, Any]) -> float:
        return -abs(float(values["a"]) - 0.8) + (0.3 if values["b"] == "y" else 0.0)

    def run(mode: str) -> list[Trial]:
        trials: list[Trial] = []
        for i in range(30):
            values = tpe.suggest(space, trials, seed=1, index=i, mode=mode)
            assert tpe.suggest(space, trials, seed=1, index=i, mode=mode) == values, "a function of the record"
            trials.append(trial(i, metric=gain(values), values=values, curve=((1, gain(values)),)))
        return trials

    drawn = statistics.fmean(gain(random_values(space, 1, i)) for i in range(1000))
    assert statistics.fmean(gain(t.values) for t in run("max")[15:]) > drawn + 0.15
    assert statistics.fmean(gain(t.values) for t in run("min")[15:]) < drawn - 0.15


def test_tpe_without_optuna_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(OrchestratorError) as caught:
        tpe.require()
    assert str(caught.value) == (
        "sampler: tpe needs Optuna, which is not installed; install it (pip install 'hff-orchestrator[search]') "
        "or use sampler random"
    )
