"""Whole searches in this process: record, best job, MLflow, going on, failures, layer by layer. Ray is not needed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.errors import CheckpointError, Interrupted, JobError, OrchestratorError
from orchestrator.job.load import INTERPRETER_LINE, load_job
from orchestrator.launch.driver import run_job
from orchestrator.launch.searches.trial import Board, run_trials_here
from orchestrator.run.folder import read_json
from tests.conftest import SUMMARY_KEYS
from tests.search.conftest import run, write_search

# Of MLflow and its database layer.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shared_database: Path) -> dict[str, Any]:
    """A finished search of three trials, two of them with what ASHA leaves of them.

    A stop is seen within half a second: the trials take some seconds.
    """
    folder = tmp_path_factory.mktemp("search")
    path = write_search(folder, shared_database)
    longer = ("base.train.epochs=12", "base.train.global_batch_size=20")
    flags = ("scheduler={name: asha, grace_epochs: 1, reduction_factor: 2}", *longer)
    summary, said = run(path, *flags)
    return {
        "path": path, "flags": flags, "folder": folder / "runs" / "small", "summary": summary, "said": said,
        "uri": f"sqlite:///{shared_database}", "experiment": f"search-{folder.name}",
    }  # fmt: skip


def test_the_summary_tells_every_trial_and_the_best(finished: dict[str, Any]) -> None:
    s = finished["summary"]
    assert (s["kind"], s["status"], s["strategy"], len(s["trials"])) == ("search", "finished", "flat", 3)
    assert sum(s["counts"].values()) == 3
    best = max((t for t in s["trials"] if t["status"] == "finished"), key=lambda t: t["metric"])
    assert s["best"]["index"] == best["index"]
    assert s["val_top1"] == s["best"]["metric"] == best["metric"] == best["curve"][-1][1]
    run = read_json(finished["folder"] / "trials" / s["best"]["name"] / "summary.json")
    assert run is not None
    assert s.keys() >= SUMMARY_KEYS, "those of every kind of run; what is not the search's own is of its best run"
    own = {"name", "kind", "run_id", "seed", "wall_seconds"}
    assert {key: s[key] for key in run if key not in own} == {key: run[key] for key in run if key not in own}
    assert (s["name"], s["run_id"] != run["run_id"]) == ("small", True)
    assert s["train_seconds"] == pytest.approx(sum(t["seconds"] for t in s["trials"]))
    assert read_json(finished["folder"] / "summary.json") == json.loads(json.dumps(s))


def test_each_trial_is_one_ordinary_run_with_its_values(finished: dict[str, Any]) -> None:
    for trial in finished["summary"]["trials"]:
        folder = finished["folder"] / "trials" / trial["name"]
        job = load_job(folder / "job.yaml")
        assert (job.train.lr, job.objective.prototypes_per_class) == tuple(trial["values"].values())
        if trial["status"] == "finished":
            assert read_json(folder / "summary.json")["val_top1"] == trial["metric"]


def test_a_stopped_trial_ends_early_with_its_checkpoint(finished: dict[str, Any]) -> None:
    stopped = [t for t in finished["summary"]["trials"] if t["status"] == "stopped"]
    assert stopped, "the space is wide enough for one to be hopeless"
    for trial in stopped:
        assert trial["curve"][-1][0] < 12
        folder = finished["folder"] / "trials" / trial["name"]
        assert read_json(folder / "outcome.json")["status"] == "interrupted"
        assert not list(folder.glob("stop-*"))
    assert any("stopped  val_top1" in line for line in finished["said"])


def test_the_best_job_is_runnable_and_gives_the_same_weights(finished: dict[str, Any]) -> None:
    best = finished["folder"] / "best.yaml"
    assert stat.S_IMODE(best.stat().st_mode) == 0o755
    assert best.read_text().splitlines()[0] == INTERPRETER_LINE
    again = run_job(load_job(best), say=lambda text: None)
    assert again["name"] == "small-best"
    assert again["val_top1"] == finished["summary"]["best"]["metric"]
    assert again["weights_sha256"] == finished["summary"]["best"]["weights_sha256"]


def test_mlflow_has_one_parent_and_a_child_for_each_trial(finished: dict[str, Any]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(finished["uri"])
    experiment = client.get_experiment_by_name(finished["experiment"])
    s = finished["summary"]
    parent = client.get_run(s["run_id"])
    assert (parent.info.status, parent.data.tags["job.kind"]) == ("FINISHED", "search")
    assert parent.data.metrics["best/val_top1"] == s["best"]["metric"]
    assert parent.data.tags["search.best_trial"] == s["best"]["name"]
    assert {a.path for a in client.list_artifacts(s["run_id"])} >= {"summary.json", "best.yaml", "report.html"}
    query = f"tags.`mlflow.parentRunId` = '{s['run_id']}'"
    children = {r.info.run_id: r for r in client.search_runs([experiment.experiment_id], query)}
    assert set(children) == {t["run_id"] for t in s["trials"]}
    for trial in s["trials"]:
        child = children[trial["run_id"]]
        assert child.info.status == {"finished": "FINISHED", "stopped": "KILLED"}[trial["status"]]
        assert child.data.tags["search.status"] == trial["status"]
        assert child.data.params["train.lr"] == str(trial["values"]["train.lr"])


def test_a_finished_search_says_so_and_another_one_needs_another_name(finished: dict[str, Any]) -> None:
    again, said = run(finished["path"], *finished["flags"], runner=None)
    assert again == json.loads(json.dumps(finished["summary"]))
    assert said == [
        f"Search small is finished already ({finished['folder'] / 'summary.json'}). "
        "Use --resume never to run it afresh, or give it another name."
    ]
    with pytest.raises(JobError) as caught:
        run(finished["path"], *finished["flags"], "seed=1", "base.train.weight_decay=0.5")
    assert str(caught.value) == (
        "small: the search differs from the one that was started under this name:\n"
        "  base.train.weight_decay: was 0.0, is 0.5\n"
        "  seed: was 0, is 1\n"
        "Give it another name, undo the change, or start afresh with --resume never."
    )


def test_the_page_shows_values_importance_curves_and_trials(finished: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(finished["folder"]), "--out", str(page)]) == 0
    text = page.read_text()
    for words in (
        "one line per trial",
        "Share of each value",
        "val_top1 over epochs",
        "prototypes_per_class",
        "Best job",
    ):
        assert words in text, words
    assert text.count("<polyline") >= 3
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")


def test_more_samples_go_on_with_the_same_trials(search_file: Callable[..., Path]) -> None:
    path = search_file()
    first, _ = run(path, "samples=1")
    second, said = run(path, "samples=2")
    assert second["trials"][0] == first["trials"][0]
    assert len(second["trials"]) == 2
    assert not any(line.startswith("trial   0") for line in said)


class StopsAfter:
    """Runs trials and is told to stop, as by Ctrl-C, when a trial has reported an epoch."""

    def __init__(self, stop_file: Path, index: int) -> None:
        self.stop_file, self.index = stop_file, index

    def __call__(self, board: Board) -> None:
        decide = board.on_result

        def on_result(index: int, epoch: int, metric: float, last: bool) -> bool:
            if index == self.index:
                self.stop_file.touch()
            return decide(index, epoch, metric, last)

        board.on_result = on_result  # type: ignore[method-assign]
        run_trials_here(board)


def test_a_stopped_search_goes_on_where_it_was(search_file: Callable[..., Path], tmp_path: Path) -> None:
    path = search_file()
    flags = ("base.train.epochs=8", "samples=2")
    stop_file = tmp_path / "runs" / "small" / "stop"
    with pytest.raises(Interrupted) as caught:
        run(path, *flags, runner=StopsAfter(stop_file, 1))
    assert str(caught.value) == "small was stopped with 1 trials left; run the same command again to go on"
    saved = read_json(tmp_path / "runs" / "small" / "search.json")
    assert [t["status"] for t in saved["trials"]] == ["finished", "running"]
    summary, said = run(path, *flags)
    assert [t["values"] for t in summary["trials"]] == [t["values"] for t in saved["trials"]]
    assert not any(line.startswith("trial   0") for line in said), "a finished trial is not repeated"
    assert any(line.startswith("trial   1 of 2 goes on") for line in said)
    steps = read_json(tmp_path / "runs" / "small" / "trials" / "small-001" / "summary.json")["attempt_steps"]
    assert len(steps) == 2
    assert steps[1][0] == steps[0][1] > 0, "it went on from its checkpoint"
    epochs = [e for e, _ in summary["trials"][1]["curve"]]
    assert epochs[0] == 1
    assert epochs == sorted(set(epochs)), "no epoch counts twice"
    assert epochs[-1] == 8


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(search_file: Callable[..., Path]) -> None:
    summary, said = run(
        search_file(), "space={train.lr: {choice: [1.0e-3, 1.0e+35]}}", "samples=4", "base.train.optimizer=sgd",
        "base.train.epochs=1",
    )  # fmt: skip
    status = {t["values"]["train.lr"]: t["status"] for t in summary["trials"]}
    assert status == {1e-3: "finished", 1e35: "failed"}
    failed = next(t for t in summary["trials"] if t["status"] == "failed")
    assert "its loss is not finite" in failed["message"]
    assert any("failed" in line and "not finite" in line for line in said)


def loses_its_first(board: Board) -> None:
    """As Ray Tune does when the process of a trial is gone."""
    task = board.next_task()
    assert task is not None
    board.on_lost(task.index, "the actor died")
    run_trials_here(board)


def test_a_lost_trial_is_told_and_goes_on_when_the_search_is_run_again(search_file: Callable[..., Path]) -> None:
    path = search_file()
    flags = ("samples=2", "base.train.epochs=1")
    with pytest.raises(OrchestratorError) as caught:
        run(path, *flags, runner=loses_its_first)
    assert str(caught.value) == (
        "small: trials 0 did not end: the actor died\n"
        "Run the same command again: they go on from their checkpoints, finished trials are kept."
    )
    summary, said = run(path, *flags)
    assert [t["status"] for t in summary["trials"]] == ["finished", "finished"]
    assert not any(line.startswith("trial   1") for line in said)


def test_a_search_in_which_nothing_finishes_is_an_error_with_the_reason(search_file: Callable[..., Path]) -> None:
    with pytest.raises(OrchestratorError) as caught:
        run(search_file(), "space={train.lr: {choice: [1.0e+35]}}", "samples=1", "base.train.optimizer=sgd")
    assert str(caught.value).startswith("small: no trial has finished; trial 0: layer ")
    assert "its loss is not finite" in str(caught.value)


def test_must_needs_a_search_to_go_on_with(search_file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        run(search_file(), resume="must")
    assert str(caught.value) == (
        f"{tmp_path / 'runs' / 'small'}: there is no search to go on with (--resume must); run without it to start one"
    )


def test_a_grid_tries_every_combination(search_file: Callable[..., Path]) -> None:
    space = "space={train.lr: {grid: [1.0e-3, 5.0e-3]}, objective.margin: {choice: [0.1]}}"
    text = search_file()
    text.write_text(text.read_text().replace("samples: 3\n", ""))
    summary, _ = run(text, space, "sampler=grid", "base.train.epochs=1")
    assert [tuple(t["values"].values()) for t in summary["trials"]] == [
        (1e-3, 0.1), (5e-3, 0.1)
    ]  # fmt: skip


def test_a_layerwise_search_is_bit_for_bit_the_run_of_its_best_job(
    search_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = search_file(train=", schedule: sequential")
    summary, _ = run(path, "strategy=layerwise", "samples=2", "scheduler={name: asha, reduction_factor: 2}")
    trials = summary["trials"]
    assert [t["layer"] for t in trials] == [0, 0, 1, 1]
    below = max((t for t in trials if t["layer"] == 0 and t["status"] == "finished"), key=lambda t: t["metric"])
    assert {t["parent"] for t in trials if t["layer"] == 1} == {below["index"]}
    best = trials[summary["best"]["index"]]
    assert best["layer"] == 1
    folder = tmp_path / "runs" / "small"
    part = read_json(folder / "trials" / best["name"] / "summary.json")
    assert part["attempt_steps"][0][0] == 3 * 7, "it began where the first layer was settled"
    job = load_job(folder / "best.yaml")
    assert [p.lr for p in job.per_layer] == [below["values"]["train.lr"], best["values"]["train.lr"]]
    whole = run_job(job, say=lambda text: None)
    assert whole["attempt_steps"] == [[0, 6 * 7]]
    for key in ("weights_sha256", "order_sha256", "val_top1", "job_sha256"):
        assert whole[key] == part[key], key
    assert whole["layers"][0]["val_top1"] == below["metric"], "the settled layer stayed as it was"


def test_layers_differ_when_their_values_do(tmp_path: Path, shared_database: Path) -> None:
    """`per_layer` of the first layer alone leaves the other layer's first weights, and changes the first."""
    path = tmp_path / "one.yaml"
    path.write_text(
        f"kind: train\nname: one\nruns: {tmp_path / 'runs'}\ndata: digits\n"
        "model: {arch: mlp, widths: [8, 8]}\nobjective: {name: hff}\n"
        "train: {epochs: 1, global_batch_size: 200, lr: 1.0e-3, schedule: sequential}\n"
        f"cluster: {{launcher: process}}\ntracking: {{uri: 'sqlite:///{shared_database}'}}\n"
    )
    base = load_job(path, ["train.lr=2e-3", "name=base"])
    same = load_job(path, ["per_layer=[{lr: 2e-3}, {lr: 2e-3}]", "name=same"])
    other = load_job(path, ["per_layer=[{lr: 2e-3}, {lr: 3e-3, prototypes_per_class: 2}]", "name=other"])
    a, b, c = (run_job(job, say=lambda text: None) for job in (base, same, other))
    assert a["weights_sha256"] == b["weights_sha256"], "a value of its own is the same as one for all"
    assert c["weights_sha256"] != a["weights_sha256"]
    assert c["layers"][0]["val_top1"] == a["layers"][0]["val_top1"], "layer 0 does not see layer 1's values"


def test_a_trial_larger_than_the_cluster_is_refused_by_check_and_run(
    search_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for command in ("check", "run"):
        assert main([command, str(search_file()), "--set", "base.cluster.cpus_per_worker=3"]) == 2
        assert capsys.readouterr().err.strip() == (
            "base.cluster: one trial must fit into this machine, which has 2 CPU, got 3 CPU (1 x 3 for its workers); "
            "use fewer workers or lower base.cluster.cpus_per_worker"
        )
