"""Bad search files: the exact message of each, exit code 2."""

# One row a line reads better than five lines a row.
# ruff: noqa: E501

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.errors import EXIT_JOB, JobError
from orchestrator.job.load import load_any
from orchestrator.job.search import SearchJob
from orchestrator.search.fit import check_offline

GOOD = """\
kind: search
name: sample
base:
  data: digits
  model: {arch: mlp, widths: [8, 8]}
  objective: {name: hff}
  train:
    epochs: 4
    global_batch_size: 100
    lr: 1e-3
  cluster: {cpus_per_worker: 0.4}
space:
  train.lr: {loguniform: [1e-4, 1e-1]}
  objective.margin: {uniform: [0, 0.3]}
"""
LR = "  train.lr: {loguniform: [1e-4, 1e-1]}\n"
MARGIN = "  objective.margin: {uniform: [0, 0.3]}\n"
SEQUENTIAL = ("lr: 1e-3", "lr: 1e-3\n    schedule: sequential")
LAYERWISE = ("space:", "strategy: layerwise\nspace:")
LAYER_PATHS = (
    "train.lr, train.weight_decay, objective.margin, objective.scale, objective.sharpness, objective.label_smoothing, "
    "objective.prototypes_per_class"
)

ROWS: dict[str, tuple[tuple[tuple[str, str], ...], tuple[str, ...], str]] = {
    "path that does not exist": ((("train.lr:", "train.lrate:"),), (), "PATH:13: space.train.lrate: must be a value of the base job, got 'train.lrate'; did you mean 'train.lr'?"),
    "path of another objective": ((("{name: hff}", "{name: ce}"),), (), "PATH:14: space.objective.margin: must be a value of the base job, got 'objective.margin'; did you mean 'objective.similarity'?"),
    "path that decides nothing": ((("train.lr:", "cluster.workers:"),), (), "PATH:13: space.cluster.workers: must be a value that decides the result of a run (not kind, name, runs, cluster, tracking, checkpoint, controls), got 'cluster.workers'"),
    "metric that no run reports": ((), ("metric=val_acc",), "--set: metric: must be one that a run reports (val_top1, val_top5, train_loss), got 'val_acc'"),
    "metric with a slip": ((("space:", "metric: val_top\nspace:"),), (), "PATH:12: metric: must be one that a run reports (val_top1, val_top5, train_loss), got 'val_top'; did you mean 'val_top5'?"),
    "metric without validation data": ((("data: digits", "data: {train: data/x, image_size: 8}"),), (), "PATH:1: metric: must be one that this base reports (train_loss; others need base.data.val), got 'val_top1'"),
    "mode of another metric": ((), ("metric=train_loss",), "PATH:1: mode: must be min with metric train_loss, got 'max'"),
    "runs in a store": ((("name: sample", "name: sample\nruns: s3://bucket/runs"),), (), "PATH:3: runs: must be a folder that all nodes share, for a search, got 's3://bucket/runs'"),
    "zero samples": ((("space:", "samples: 0\nspace:"),), (), "PATH:12: samples: must be >= 1, got 0"),
    "empty space": (((LR, ""), (MARGIN, ""), ("space:\n", "space: {}\n")), (), "PATH:12: space: must name at least one value of the base job, got none"),
    "space of nothing": (((LR, ""), (MARGIN, "")), (), "PATH:12: space: must be a mapping of keys, got nothing"),
    "no choice": (((LR, "  train.lr: {choice: []}\n"),), (), "PATH:13: space.train.lr: choice must have at least one value, got []"),
    "two domains": (((LR, "  train.lr: {choice: [1.0], uniform: [1, 2]}\n"),), (), "PATH:13: space.train.lr: must have exactly one of choice, uniform, loguniform, randint, quniform, grid, got choice and uniform"),
    "no domain": (((LR, "  train.lr: {}\n"),), (), "PATH:13: space.train.lr: must have exactly one of choice, uniform, loguniform, randint, quniform, grid, got none"),
    "bounds the wrong way": (((LR, "  train.lr: {uniform: [2, 1]}\n"),), (), "PATH:13: space.train.lr: uniform must be [least, greatest], got [2.0, 1.0]"),
    "step larger than the domain": (((LR, "  train.lr: {quniform: [1, 2, 3]}\n"),), (), "PATH:13: space.train.lr: quniform must have a step of at most greatest - least, got [1.0, 2.0, 3.0]"),
    "choice that the base cannot be": (((LR, "  train.lr: {choice: [0.1, -1]}\n"),), (), "PATH:13: space.train.lr: -1 makes no valid job: base: train.lr: must be > 0, got -1"),
    "bound that the base cannot have": (((MARGIN, "  objective.margin: {uniform: [0, 3]}\n"),), (), "PATH:14: space.objective.margin: 3.0 makes no valid job: base: objective.margin: must be >= 0 and <= 2, got 3.0"),
    "grid without the sampler": (((LR, "  train.lr: {grid: [0.1, 0.2]}\n"),), (), "PATH:13: space.train.lr: must be choice with sampler random (grid goes with sampler grid), got grid"),
    "interval in a grid": (((MARGIN, ""), ("space:", "sampler: grid\nspace:")), (), "PATH:14: space.train.lr: must be grid or choice with sampler grid, got loguniform"),
    "samples of a grid": (((LR, "  train.lr: {grid: [0.1, 0.2]}\n"), (MARGIN, "")), ("sampler=grid", "samples=3"), "--set: samples: must be left out or 2, the combinations of the grid, got 3"),
    "population based training": ((("space:", "scheduler: {name: pbt}\nspace:"),), (), "PATH:12: scheduler.name: must be one of asha, median, none, got 'pbt'"),
    "bad base": ((("lr: 1e-3", "lr: -1"),), (), "PATH:10: base.train.lr: must be > 0, got -1"),
    "bad override of the base": ((), ("base.train.lr=-1",), "--set: base.train.lr: must be > 0, got -1"),
    "last word of a value of the base": ((), ("lr=1",), "--set: lr: must be a key of a job, got 'lr'; did you mean 'base.train.lr'?"),
    "layerwise, not sequential": ((LAYERWISE,), (), "PATH:3: base: must have train.schedule sequential with strategy layerwise, which settles one layer after the other, got 'simultaneous'"),
    "layerwise over a value of the whole": ((SEQUENTIAL, LAYERWISE, (MARGIN, "  train.seed: {randint: [0, 9]}\n")), (), f"PATH:16: space.train.seed: must be a value that a layer can have of its own ({LAYER_PATHS}) with strategy layerwise, got 'train.seed'"),
    "layerwise without epochs": ((SEQUENTIAL, LAYERWISE, ("epochs: 4", "steps: 40")), (), "PATH:3: base: must give its duration in train.epochs with strategy layerwise"),
    "layerwise with layers that are settled": ((SEQUENTIAL, LAYERWISE, ("  cluster:", "  per_layer: [{lr: 0.1}]\n  cluster:")), (), "PATH:3: base: must have no per_layer with strategy layerwise, which finds it, got 1 entries"),
}  # fmt: skip


def write(tmp_path: Path, changes: tuple[tuple[str, str], ...] = ()) -> Path:
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return path


def said(path: Path, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        load_any(path, overrides)
    assert caught.value.exit_code == EXIT_JOB
    return str(caught.value)


def search(path: Path, *overrides: str) -> SearchJob:
    job = load_any(path, overrides)
    assert isinstance(job, SearchJob)
    return job


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_search_gets_exactly_its_message(name: str, tmp_path: Path) -> None:
    changes, overrides, message = ROWS[name]
    path = write(tmp_path, changes)
    assert said(path, *overrides) == message.replace("PATH", str(path))


def test_the_search_that_all_rows_change_is_good(tmp_path: Path) -> None:
    job = search(write(tmp_path), "samples=3", "base.train.epochs=1")
    assert (job.trials_each, job.base["train"]["epochs"], job.base["train"]["lr"]) == (3, 1, 0.001)
    assert search(write(tmp_path)).trials_each == 10
    assert search(write(tmp_path, (SEQUENTIAL, LAYERWISE))).strategy == "layerwise"


def test_a_base_may_be_a_file_and_its_mistakes_are_told(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(
        "kind: train\nname: b\ndata: digits\nmodel: {arch: mlp, widths: [8]}\nobjective: {name: ce}\n"
        "train: {epochs: 1, global_batch_size: 50, lr: 1e-3}\n"
    )
    path = tmp_path / "x.yaml"
    path.write_text("kind: search\nname: s\nbase: base.yaml\nspace: {train.lr: {uniform: [0.1, 1]}}\n")
    assert search(path, "base.train.lr=0.25").base["train"]["lr"] == 0.25
    assert said(path, "base.train.lr=-1") == (
        f"{path}:3: base: must be a job that is valid, got 'base.yaml':\n  --set: train.lr: must be > 0, got -1"
    )


def test_a_trial_larger_than_this_machine_is_refused_with_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path = write(tmp_path)
    assert check_offline(search(path)) == 4
    with pytest.raises(JobError) as caught:
        check_offline(search(path, "base.cluster={workers: 2, cpus_per_worker: 1.0}"))
    assert str(caught.value) == (
        "base.cluster: one trial must fit into this machine, which has 2 CPU, got 2.1 CPU (0.1 for its driver + "
        "2 x 1 for its workers); use fewer workers or lower base.cluster.cpus_per_worker"
    )
    with pytest.raises(JobError) as caught:
        check_offline(search(path, "concurrency=5"))
    assert str(caught.value) == (
        "concurrency: must be at most 4, got 5: a trial needs 0.5 CPU (0.1 for its driver + 1 x 0.4 for its workers) "
        "and this machine has 2 CPU"
    )
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert check_offline(search(path, "concurrency=5")) is None, "only the run can ask a cluster"
