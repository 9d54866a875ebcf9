"""Workers of this machine that never come to work: each is told of with its reason, and none is left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.launch.workers import local
from orchestrator.run.folder import RunFolder, read_json
from orchestrator.run.worker import Assignment
from tests.pipeline.ranks import start_process
from tests.processes import free_port


def two_workers(folder: Path) -> Assignment:
    cluster = {"use_gpu": False, "timeout_s": 2.0, "threads_per_worker": 1}
    return Assignment(
        job={"cluster": cluster},
        job_sha256="",
        run_dir=str(folder),
        attempt=3,
        resume_from=None,
        weights_only=False,
        run_id=None,
        ranges=[(0, 0), (1, 1)],
        replicas=[1, 1],
        layer_names=["a", "b"],
        layer_outputs=[(1,), (1,)],
        steps_per_epoch=1,
        max_batch=2,
        micro_batches=1,
        num_classes=2,
        attempt_steps=[],
        git_commit=None,
        token="t",
    )


def test_a_worker_that_cannot_meet_the_others_writes_down_why(tmp_path: Path) -> None:
    worker = start_process(local._child, 1, 2, free_port(), two_workers(tmp_path), dict(os.environ))
    worker.join(60)
    assert worker.exitcode == 1
    report = read_json(RunFolder(tmp_path).failure_file(3, 1))
    assert report["type"].startswith("Dist")
    assert "127.0.0.1" in report["message"]


def test_where_a_process_cannot_be_started_those_before_it_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, started = multiprocessing.process.BaseProcess.start, list[Any]()

    def start(process: Any) -> None:
        if process.name == "worker-1":
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(process)
        begin(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    with pytest.raises(local.WorkerFailure, match=r"worker 1 could not be started: .*Resource temporarily unavailable"):
        local.run_processes(two_workers(tmp_path))
    assert [process.name for process in started] == ["worker-0"]
    assert not started[0].is_alive()
