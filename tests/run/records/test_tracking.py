"""Metrics on their way to MLflow: whatever it missed arrives later, once, in the order of steps."""

from __future__ import annotations

import json
import multiprocessing
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.run.folder import RunFolder, write_json
from orchestrator.run.inference.logged_model import log_model
from orchestrator.run.records import tracking
from orchestrator.show.listings import runs

pytestmark = pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer


def epoch(number: int) -> dict[str, Any]:
    """The line of an epoch of 10 steps; each metric has a value of its own."""
    return {
        "event": "epoch", "epoch": number, "step": 10 * number, "learning_rate": 1 / number,
        "train_loss": [2 / number, 3 / number], "images_per_second": 100.0 + number,
        "val_top1": 1 - 1 / number, "val_top5": 1 - 1 / (2 * number), "layer_val_top1": [0.5, 1 - 1 / number],
        "busy_fraction": [0.5, 0.25],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, shared_database: Path) -> RunFolder:
    """A run that is tracked in a database, none of whose events has been sent."""
    folder = RunFolder(tmp_path / "a")
    folder.path.mkdir()
    folder.job.write_text("name: a\n")
    uri = f"sqlite:///{shared_database}"
    run_id = tracking.create_run(uri, "tests", "a", params={}, tags={}, artifacts=tmp_path / "artifacts")
    write_json(folder.attempts, [{"attempt": 1, "run_id": run_id}])
    write_json(folder.path / "tracking.json", {"uri": uri, "run_id": run_id})
    return folder


def store(folder: RunFolder) -> tuple[str, str]:
    saved = json.loads((folder.path / "tracking.json").read_text())
    return saved["uri"], saved["run_id"]


def sent(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """What MLflow has: of every metric its (step, value), by step."""
    uri, run_id = store(folder)
    with tracking.client_of(uri) as client:
        names = client.get_run(run_id).data.metrics
        return {n: sorted((m.step, m.value) for m in client.get_metric_history(run_id, n)) for n in names}


def expected(numbers: range) -> dict[str, list[tuple[int, float]]]:
    lines = [epoch(number) for number in numbers]
    return {
        name: [(line["step"], tracking.epoch_metrics(line)[name]) for line in lines]
        for name in tracking.epoch_metrics(lines[0])
    }


def test_every_metric_that_a_black_hole_swallowed_arrives_once_by_replay(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_POLL_S", 0.01)
    monkeypatch.setattr(tracking, "_REQUEST_TIMEOUT_S", 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as hole:  # connections are made, nothing is ever answered
        uri = f"http://127.0.0.1:{hole.getsockname()[1]}"
        sink = tracking.EventSink(uri, store(folder)[1], folder.path)
        sink.start()
        spent = 0.0
        for number in range(1, 21):
            began = time.perf_counter()
            folder.append_event(epoch(number))
            spent += time.perf_counter() - began
            time.sleep(0.01)
        began = time.perf_counter()
        sink.stop()
        assert time.perf_counter() - began < 10, "a run's end waits for a few requests, not for ever"
        hole.settimeout(5)
        hole.accept()[0].close()  # it was asked
        with pytest.raises(OrchestratorError, match="cannot be used"):
            tracking.replay_all(uri, store(folder)[1], folder.path)
    assert spent < 3, "a wait for MLflow would take a second each time: the loop writes a line and goes on"
    warned = [event["text"] for event in folder.read_events()[0] if event["event"] == "warning"]
    assert len(warned) == 1
    assert "MLflow does not answer" in warned[0]
    assert sent(folder) == {}
    assert runs.replay(folder.path) == 0
    assert sent(folder) == expected(range(1, 21))
    assert runs.replay(folder.path) == 0
    assert sent(folder) == expected(range(1, 21)), "nothing twice"


def test_what_was_written_last_is_sent_when_a_run_ends(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_POLL_S", 3600.0)
    sink = tracking.EventSink(*store(folder), folder.path)
    sink.start()
    folder.append_event(epoch(1))
    sink.stop()
    assert sent(folder) == expected(range(1, 2))


def test_only_what_is_new_is_sent_but_to_another_mlflow_run_all_of_it(folder: RunFolder, tmp_path: Path) -> None:
    """A machine whose database does not know the run makes a new one (`create_run`)."""
    uri, run_id = store(folder)
    for number in (1, 2, 3):
        folder.append_event(epoch(number))
        assert tracking.replay(uri, run_id, folder.path) == 1
    assert sent(folder) == expected(range(1, 4))
    another = tracking.create_run(uri, "tests", "a", params={}, tags={}, artifacts=tmp_path, run_id="0" * 32)
    assert another not in (run_id, "0" * 32)
    assert tracking.replay(uri, another, folder.path) == 3
    write_json(folder.path / "tracking.json", {"uri": uri, "run_id": another})
    assert sent(folder) == expected(range(1, 4))
    assert tracking.create_run(uri, "tests", "a", params={}, tags={}, artifacts=tmp_path, run_id=another) == another


def test_the_loss_of_a_run_is_that_of_its_last_layer_that_trains() -> None:
    line = epoch(1) | {"train_loss": [0.5, None, None], "scale": [20.0, None, 30.0]}
    found = tracking.epoch_metrics(line)
    assert found["train/loss"] == found["layer/00/train_loss"] == 0.5
    assert not any(name.startswith(("layer/01/train", "layer/02/train", "layer/01/scale")) for name in found)
    final = {"event": "final", "val_top1": 0.75, "val_top5": 1.0, "layer_val_top1": [0.5, 0.75]}
    assert tracking.epoch_metrics(final) == {
        "val/top1": 0.75, "val/top5": 1.0, "layer/00/val_top1": 0.5, "layer/01/val_top1": 0.75,
    }  # fmt: skip
    assert tracking.epoch_metrics({"event": "warning", "text": "x"}) == {}


def test_more_metrics_and_parameters_than_a_request_may_have_all_arrive(folder: RunFolder, tmp_path: Path) -> None:
    """MLflow takes 1000 metrics at once, 100 parameters, and of a value no more than 500 characters."""
    folder.append_event(epoch(1) | {"train_loss": [1.0] * 600, "layer_val_top1": [0.5] * 600})
    uri, run_id = store(folder)
    assert tracking.replay(uri, run_id, folder.path) == 1
    assert {name for name in sent(folder) if name.startswith("layer/")} == {
        f"layer/{i:02d}/{kind}" for i in range(600) for kind in ("train_loss", "val_top1")
    }
    params = {f"key{i}": "x" * 600 if i == 0 else i for i in range(205)}
    made = tracking.create_run(uri, "tests", "many", params=params, tags={}, artifacts=tmp_path)
    with tracking.client_of(uri) as client:
        found = client.get_run(made).data.params
    assert found == {key: str(value)[:500] for key, value in params.items()}


def test_a_clock_that_jumps_back_changes_neither_order_nor_the_last_value(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, clock in ((1, 2_000_000.0), (2, 2_000_060.0), (3, 1_000_000.0), (4, 1_000_060.0)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        folder.append_event(epoch(number))
    monkeypatch.undo()
    assert [event.get("step") for event in folder.read_events()[0]] == [10, 20, 30, 40]
    assert runs.replay(folder.path) == 0
    assert sent(folder) == expected(range(1, 5))
    uri, run_id = store(folder)
    with tracking.client_of(uri) as client:
        assert client.get_run(run_id).data.metrics["val/top1"] == epoch(4)["val_top1"]


def test_an_error_without_words_ends_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.tracking

    def silent(*arguments: object, **options: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(mlflow.tracking, "MlflowClient", silent)
    assert tracking.finish_run("x", "1", "FINISHED") == "MLflow: the run's end could not be logged: TimeoutError"
    assert tracking.note("x", "1") == "MLflow: tags could not be logged: TimeoutError"
    assert log_model("x", "1", tmp_path, {}).warning == "MLflow: the network could not be logged: TimeoutError"
    with pytest.raises(OrchestratorError, match="cannot be used: TimeoutError"):
        tracking.create_run("x", "tests", "a", params={}, tags={}, artifacts=tmp_path)


def test_the_threads_of_two_attempts_send_no_line_twice(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.tracking

    received: list[tuple[str, int]] = []

    class Slow:
        """A server that takes its time."""

        def __init__(self, **options: object) -> None:
            pass

        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            time.sleep(0.2)
            received.extend((metric.key, metric.step) for metric in metrics)

    monkeypatch.setattr(mlflow.tracking, "MlflowClient", Slow)
    folder.append_event(epoch(1))
    both = [threading.Thread(target=tracking.replay, args=("x", "1", folder.path)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(received) == len(set(received)) == len(expected(range(1, 2)))


def _begun(uri: str, folder: Path, at_once: Any, number: int) -> str:
    at_once.wait()
    tracking.open_store(uri)
    return tracking.create_run(uri, "tests", f"run-{number}", params={}, tags={}, artifacts=folder)


@pytest.mark.slow  # two imports of MLflow, and its tables
def test_runs_that_start_at_the_same_time_share_a_database_that_was_not_there(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    with spawn.Manager() as manager, ProcessPoolExecutor(2, spawn) as pool:
        at_once = manager.Barrier(2)
        begun = [pool.submit(_begun, uri, tmp_path / "artifacts", at_once, number) for number in range(2)]
        ids = [future.result(timeout=240) for future in begun]
    with tracking.client_of(uri) as client:
        (experiment,) = [e for e in client.search_experiments() if e.name == "tests"]
        assert {run.info.run_id for run in client.search_runs([experiment.experiment_id])} == set(ids)
    assert len(set(ids)) == 2
