"""What is done after a failure, and in which order its causes are told."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from orchestrator.errors import EXIT_OTHER
from orchestrator.launch import attempt
from orchestrator.launch.restart import Failure, next_action
from orchestrator.run.context import LocalContext
from orchestrator.run.folder import RunFolder, read_json
from orchestrator.run.worker import first_failure, write_failure
from tests.conftest import Command


def failure(step: int | None = 3, message: str = "it broke", **changes: object) -> Failure:
    values = {"step": step, "message": message, "traceback": "", "exit_code": 1, "final": False, "others": ()}
    return Failure(**{**values, **changes})  # type: ignore[arg-type]


def test_a_failure_is_retried_until_the_budget_is_spent() -> None:
    failures = [failure(step=1), failure(step=5)]
    assert not next_action(failures, max_failures=2).stop
    assert next_action([*failures, failure(step=9)], max_failures=2).stop
    assert next_action([failure()], max_failures=0).stop


def test_the_same_failure_at_the_same_step_is_not_tried_a_third_time() -> None:
    action = next_action([failure(), failure(step=8), failure()], max_failures=100)
    assert action.stop
    assert "same failure at the same step" in action.why
    assert not next_action([failure(), failure(message="another")], max_failures=100).stop, "not the same failure"


def test_bad_data_is_not_retried() -> None:
    assert next_action([failure(final=True, exit_code=3)], max_failures=100).stop


def test_the_error_tells_the_first_cause_first_and_keeps_its_exit_code() -> None:
    error = failure(exit_code=3, traceback="Traceback ...", others=("worker 1: LinkError: gone",)).error("Stopping.")
    lines = str(error).splitlines()
    assert lines[0] == "it broke"
    assert lines[-1] == "First cause: it broke (at step 3)"
    assert lines.index("  then worker 1: LinkError: gone") > lines.index("Traceback ...")
    assert error.exit_code == 3


def test_the_worker_that_failed_first_is_named_before_those_that_lost_a_neighbour(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "failures").mkdir()
    for rank, (when, consequence) in enumerate([(1.0, True), (3.0, False), (2.0, False), (0.5, True)]):
        report = {"rank": rank, "time": when, "consequence": consequence}
        folder.failure_file(2, rank).write_text(json.dumps(report))
    first, others = first_failure(folder, 2)
    assert first is not None
    assert [first["rank"], *(r["rank"] for r in others)] == [2, 1, 3, 0]
    assert first_failure(folder, 1) == (None, [])


@pytest.mark.parametrize(
    "hungry", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**62)], ids=["torch", "python"]
)
def test_a_worker_out_of_memory_says_so_with_the_remedy_and_may_be_started_again(
    tmp_path: Path, hungry: Callable[[], object]
) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        hungry()
    write_failure(RunFolder(tmp_path), 1, 0, caught.value)
    first, _ = first_failure(RunFolder(tmp_path), 1)
    assert first is not None
    said = "out of memory: raise train.micro_batches, lower train.global_batch_size, data.loader_threads or loader_proc"
    assert first["message"].startswith(said)
    assert first["exit_code"] == 1, "not one of the codes that come again"


class Doomed(torch.utils.data.Dataset[int]):
    """A dataset whose process the system kills."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_loader_process_that_was_killed_is_told_with_memory_as_its_likely_cause(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        next(iter(torch.utils.data.DataLoader(Doomed(), num_workers=1)))
    write_failure(RunFolder(tmp_path), 1, 0, caught.value)
    first, _ = first_failure(RunFolder(tmp_path), 1)
    assert first is not None
    said = "a loader process was killed, most likely for want of memory: lower data.loader_processes (DataLoader worker"
    assert first["message"].startswith(said)
    assert first["exit_code"] == 1


def test_a_run_that_was_told_to_stop_is_not_started_again_after_a_failure() -> None:
    action = next_action([failure()], max_failures=100, asked=True)
    assert action.stop
    assert action.why == "It was told to stop, so it is not started again: run the same command to go on."


class BreaksAtAStop(LocalContext):
    """A worker that fails while it leaves, as where its last save finds the disk full."""

    folder: ClassVar[RunFolder]

    def stop_requested(self) -> bool:
        if (read_json(self.folder.progress) or {"step": 0})["step"] >= 5:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("it breaks")
        return False


def test_a_worker_that_fails_while_it_stops_does_not_make_the_run_go_on(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "LocalContext", BreaksAtAStop)
    BreaksAtAStop.folder = RunFolder(tmp_path / "runs" / "tiny")
    words = ("train.global_batch_size=10", "cluster.max_failures=5")
    done = in_process("run", tiny_job(), *(word for setting in words for word in ("--set", setting)))
    assert done.returncode == EXIT_OTHER, done.stdout + done.stderr
    assert "RuntimeError: it breaks" in done.stderr
    assert "It was told to stop, so it is not started again" in done.stderr
    assert len(read_json(BreaksAtAStop.folder.attempts)) == 1
