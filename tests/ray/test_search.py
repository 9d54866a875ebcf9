"""Searches under Ray Tune from the command line: killed in the middle, run again, done again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Command, environment
from tests.search.conftest import write_search

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def trials(folder: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads((folder / "search.json").read_text())["trials"]
    except FileNotFoundError:
        return []
    return found


def killed_when(ready: Callable[[], bool], *arguments: str | Path) -> None:
    """Start the command line and kill its process, that one alone, as soon as `ready`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not ready():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_killed_search_leaves_no_process_and_goes_on(orchestrator: Command, tmp_path: Path) -> None:
    path = write_search(tmp_path, tmp_path / "mlflow.db")
    folder = tmp_path / "runs" / "small"
    flags = ["--set", "base.train.epochs=30", "--set", "base.cluster.cpus_per_worker=2", "--set", "samples=2"]

    def in_the_middle() -> bool:
        return any(len(t["curve"]) > 3 for t in trials(folder) if t["index"] == 1)

    killed_when(in_the_middle, "run", path, *flags)
    before = trials(folder)
    assert [t["status"] for t in before] == ["finished", "running"]
    progress = folder / "trials" / "small-001" / "progress.json"
    time.sleep(5)
    stands = progress.read_text()
    time.sleep(2)
    assert progress.read_text() == stands, "nobody trains on"
    again = orchestrator("run", path, *flags, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Traceback" not in again.stdout + again.stderr
    after = trials(folder)
    assert after[0] == before[0], "a finished trial is not repeated"
    assert after[1]["values"] == before[1]["values"]
    steps = json.loads((folder / "trials" / "small-001" / "summary.json").read_text())["attempt_steps"]
    assert len(steps) == 2
    assert steps[1][0] > 0, "it went on from its checkpoint"


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer
def test_the_digits_search_killed_in_the_middle_finishes_and_its_best_job_gives_the_same_number(
    orchestrator: Command, tmp_path: Path
) -> None:
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "runs" / "search-digits"
    job = ["run", "jobs/search-digits.yaml", "--set", f"runs={tmp_path / 'runs'}"]
    killed_when(lambda: sum(t["status"] == "finished" for t in trials(folder)) >= 2, *job)
    before = {t["index"]: t for t in trials(folder) if t["status"] != "running"}
    done = orchestrator(*job, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    after = {t["index"]: t for t in summary["trials"]}
    assert len(after) == 12
    assert all(after[i]["run_id"] == t["run_id"] and after[i]["curve"] == t["curve"] for i, t in before.items())
    assert summary["wall_seconds"] < 12 * 60
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("orchestrator")
    query = f"tags.`mlflow.parentRunId` = '{summary['run_id']}'"
    children = client.search_runs([experiment.experiment_id], query)
    assert len(children) == 12
    assert {c.info.status for c in children} <= {"FINISHED", "KILLED"}
    result = tmp_path / "best.json"
    best = orchestrator("run", folder / "best.yaml", "--summary", result, timeout=600)
    assert best.returncode == 0, best.stdout + best.stderr
    again = json.loads(result.read_text())
    assert again["val_top1"] == summary["best"]["metric"]
    assert again["weights_sha256"] == summary["best"]["weights_sha256"]
