"""A run whose driver ends between the last step and what MLflow has to be told: the same command tells it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EXIT_DONE, EXIT_INTERRUPTED
from orchestrator.launch import conclude
from orchestrator.run.folder import RunFolder, read_json
from orchestrator.run.inference.logged_model import Logged
from orchestrator.run.records.tracking import client_of
from tests.conftest import Command


def recorded(folder: RunFolder) -> tuple[str, bool]:
    """The status of a run in MLflow, and whether it has the run's summary."""
    with client_of(read_json(folder.path / "tracking.json")["uri"]) as client:
        run_id = read_json(folder.summary)["run_id"]
        files = [file.path for file in client.list_artifacts(run_id)]
        return client.get_run(run_id).info.status, "summary.json" in files


def test_a_run_that_is_interrupted_while_it_is_recorded_is_recorded_by_the_same_command(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tiny_job(), RunFolder(tmp_path / "runs" / "tiny")
    logged: list[Any] = []

    def interrupted(*arguments: Any) -> Logged:
        raise KeyboardInterrupt

    def gone(*arguments: Any) -> Logged:
        return Logged(warning="MLflow: the network could not be logged: TimeoutError")

    def there(*arguments: Any) -> Logged:
        logged.append(arguments)
        return Logged()

    monkeypatch.setattr(conclude, "log_model", interrupted)
    assert in_process("run", path, "--set", "train.epochs=1").returncode == EXIT_INTERRUPTED
    assert recorded(folder) == ("RUNNING", False)
    monkeypatch.setattr(conclude, "log_model", gone)
    again = in_process("run", path, "--set", "train.epochs=1")
    assert again.returncode == EXIT_DONE, again.stderr
    assert "Run tiny is finished already; MLflow is told what it has not been told yet." in again.stdout
    assert "TimeoutError; the same command tries again" in again.stdout
    monkeypatch.setattr(conclude, "log_model", there)
    last = in_process("run", path, "--set", "train.epochs=1")
    assert (last.returncode, len(logged)) == (EXIT_DONE, 1)
    assert recorded(folder) == ("FINISHED", True)
    assert len(read_json(folder.attempts)) == 1
    done = in_process("run", path, "--set", "train.epochs=1")
    assert "Use --resume never to run it afresh" in done.stdout
    assert len(logged) == 1
