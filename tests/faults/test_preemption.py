"""A node that is about to be taken away: saved at the step, started again elsewhere, and no failure of the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from orchestrator.errors import EXIT_DONE, EXIT_INTERRUPTED
from orchestrator.launch import attempt
from orchestrator.launch.beside import stoppable
from orchestrator.launch.workers.preemption import Preemptions
from orchestrator.run import heartbeat
from orchestrator.run.context import LocalContext
from orchestrator.run.folder import RunFolder, read_json, write_json
from orchestrator.run.heartbeat import Heartbeat
from tests.conftest import Command
from tests.runs import assert_same_bits, summary_of
from tests.stores import wait_until


class GoesAway(LocalContext):
    """A worker whose node is taken away once the run in `folder` came so far; `notices`: a step for each attempt."""

    folder: ClassVar[RunFolder]
    notices: ClassVar[list[int]]

    def __init__(self, **place: Any) -> None:
        super().__init__(**place)
        self.at = self.notices.pop(0) if self.notices else None

    def preemption(self) -> str | None:
        step = (read_json(self.folder.progress) or {"step": 0})["step"]
        return f"the node of worker {self.rank} goes away in 30 s" if self.at is not None and step >= self.at else None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PERIOD_S", 0.1)
    monkeypatch.setattr(attempt, "LocalContext", GoesAway)


def flags(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


# Two epochs of 135 steps; no failure is allowed.
LONG = ("train.global_batch_size=10", "train.lr=1e-3", "cluster.max_failures=0")


def test_a_run_whose_node_goes_away_saves_and_goes_on_with_the_same_bits(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "moved"
    GoesAway.folder, GoesAway.notices = RunFolder(run), [20, 150]
    result = in_process("run", tiny_job("moved"), *flags(*LONG))
    assert result.returncode == EXIT_DONE, result.stdout + result.stderr
    said = "the node of worker 0 goes away in 30 s: starting again elsewhere from the newest checkpoint (preemption "
    assert f"{said}1 of 100)" in result.stdout
    assert f"{said}2 of 100)" in result.stdout
    first, second, third = summary_of(run)["attempt_steps"]
    assert 0 == first[0] < first[1] == second[0] < second[1] == third[0] < third[1], "nothing was done again"
    assert 135 not in (first[1], second[1]), "in mid-epoch"
    assert in_process("run", tiny_job("whole"), *flags(*LONG)).returncode == EXIT_DONE
    assert_same_bits(run, tmp_path / "runs" / "whole")


def test_one_notice_too_many_leaves_a_run_that_can_go_on(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    GoesAway.folder, GoesAway.notices = RunFolder(tmp_path / "runs" / "spent"), [10, 30]
    result = in_process("run", tiny_job("spent"), *flags(*LONG, "cluster.max_preemptions=1"))
    assert result.returncode == EXIT_INTERRUPTED, result.stdout + result.stderr
    assert "(preemption 1 of 1)" in result.stdout
    assert "run the same command again to go on" in result.stderr


def test_any_worker_passes_a_notice_on_and_says_whose_node_it_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    GoesAway.folder, GoesAway.notices = folder, [0]
    with Heartbeat(folder, 4, GoesAway(rank=1, world_size=2)):
        wait_until(folder.stop_file(4).exists)
    assert read_json(folder.notice_file(4)) == {"rank": 1, "what": "the node of worker 1 goes away in 30 s"}


def test_a_run_that_was_told_to_stop_is_not_started_again(tmp_path: Path) -> None:
    """Whichever came first, the notice or the wish of a user."""
    folder = RunFolder(tmp_path)
    GoesAway.folder, GoesAway.notices = folder, [0]
    folder.stop_file(1).touch()
    with Heartbeat(folder, 1, GoesAway(rank=1, world_size=2)):
        time.sleep(0.2)
    budget = Preemptions(folder, 100)
    assert budget.again(1) is None
    folder.notice_file(2).parent.mkdir(exist_ok=True)
    write_json(folder.notice_file(2), {"rank": 0, "what": "it goes away"})
    assert Preemptions(folder, 100).again(2) is not None
    with stoppable(folder, 2, 0.05 / 3600, lambda _: None):
        wait_until(folder.stop_file(2).exists)
        wait_until(lambda: not folder.notice_file(2).exists())
    assert budget.again(2) is None
