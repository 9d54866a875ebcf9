"""Where the time to the first step went: every second once, whoever counted it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.run.folder import RunFolder
from orchestrator.run.prepare import Attempt, followed_run_id, record_attempt
from orchestrator.run.records.start import StartClock, on_worker, without_collector
from orchestrator.run.records.tracking import epoch_metrics
from tests.conftest import Command


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of both clocks; the wall clock is far ahead."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 + now[0])
    return now


def test_the_worker_counts_on_from_where_the_driver_was(clock: list[float]) -> None:
    driver = StartClock(began=97.0)
    driver.mark("job")
    clock[0] += 2
    driver.mark("MLflow")
    launched = time.time()
    clock[0] += 5
    worker = on_worker(driver.seconds, launched)
    clock[0] += 1
    worker.mark("network")
    clock[0] += 0.5
    assert worker.total() == 11.5
    worker.mark("first batch")
    assert worker.seconds == {"job": 3, "MLflow": 2, "workers": 5, "network": 1, "first batch": 0.5}
    assert worker.total() == sum(worker.seconds.values()) == 11.5


def test_a_worker_whose_clock_is_behind_counts_no_negative_time(clock: list[float]) -> None:
    assert on_worker({"job": 1.0}, time.time() + 60).seconds == {"job": 1.0, "workers": 0.0}


def test_a_process_knows_when_it_began_before_it_could_read_a_clock() -> None:
    code = (
        "import time; time.sleep(0.5); from orchestrator.run.records.start import process_began; "
        "print(time.monotonic() - process_began())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 <= float(done.stdout) <= time.monotonic() - began + 0.02, "clock ticks are of 10 ms"


def test_garbage_is_collected_again_after_imports_that_failed_and_not_where_nobody_collected() -> None:
    def imports() -> None:
        with without_collector():
            assert not gc.isenabled()
            raise ImportError

    with pytest.raises(ImportError):
        imports()
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_worker_that_began_before_its_mlflow_run_was_made_waits_for_it_and_not_for_ever(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    attempt = Attempt(number=1, resume_from=None, earlier_steps=[], run_id=None, warnings=[])
    record_attempt(folder, attempt, 0, None)
    with pytest.raises(OrchestratorError, match="the driver did not write down its MLflow run"):
        followed_run_id(folder, timeout_s=0.2)
    later = threading.Timer(0.2, record_attempt, [folder, attempt, 0, "abc"])
    later.start()
    assert followed_run_id(folder, timeout_s=20) == "abc"


def test_a_run_says_where_its_start_went_in_its_output_its_events_and_mlflow(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    began = time.monotonic()
    result = in_process("run", tiny_job(), "--set", "train={steps: 3, global_batch_size: 50, lr: 1e-3}")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("First step after ")]
    assert len(lines) == 1
    event = next(e for e in RunFolder(tmp_path / "runs" / "tiny").read_events()[0] if e["event"] == "first_step")
    assert list(event["seconds"]) == ["job", "MLflow", "workers", "network", "first batch"]
    assert event["step"] == 1
    metrics = epoch_metrics(event)
    assert metrics["start/first_batch_seconds"] == event["seconds"]["first batch"]
    assert metrics["start/total_seconds"] == pytest.approx(sum(event["seconds"].values()))
    assert sum(event["seconds"].values()) - event["seconds"]["job"] < time.monotonic() - began
