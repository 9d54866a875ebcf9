"""How many workers an elastic job takes of those that are there, and when it starts again with more."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from hff.shapes import HeadShape, VggOptions, describe
from orchestrator.errors import EXIT_INTERRUPTED, JobError
from orchestrator.launch import attempt, driver
from orchestrator.launch.workers import elastic
from orchestrator.launch.workers.elastic import Elastic, Pace
from orchestrator.pipeline.plan import Plan, make_plan
from orchestrator.run.context import LocalContext
from orchestrator.run.folder import RunFolder, read_json, write_json
from tests.conftest import Command
from tests.stores import wait_until

SHAPES = describe(VggOptions(widths=(8, 8)), (1, 8, 8), HeadShape("prototype", 10, 1))


@dataclass
class Nodes:
    """A cluster of which somebody else says what it has room for."""

    rooms: list[int] = field(default_factory=list)
    free: int = 0
    # Nodes that come and go: what is free at one look and the next.
    flickers: bool = False
    looks: int = 0

    def room(self) -> int:
        return self.rooms.pop(0)

    def spare(self) -> int:
        self.looks += 1
        return self.free if not self.flickers or self.looks % 2 else 0


def plan_of(workers: int) -> Plan:
    """Plans of two layers and batches of four: 1, 2, 3, 4, 5, 6 or 8 workers can share them out."""
    return make_plan(
        SHAPES, workers=workers, stages="auto", global_batch_size=4, num_samples=100, num_classes=10, optimizer="sgd"
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "_LOOK_S", 0.02)


def test_as_many_workers_as_are_there_and_can_share_out_the_layers() -> None:
    job = Elastic(2, 8, plan_of, Nodes())
    chosen = {there: job.chosen(there) for there in (1, 2, 5, 7, 8, 100)}
    assert {there: plan and plan.workers for there, plan in chosen.items()} == {1: None, 2: 2, 5: 5, 7: 6, 8: 8, 100: 8}
    fewer = Elastic(2, 7, plan_of, Nodes()).chosen(7)
    assert fewer is not None
    assert fewer.workers == 6
    for there in (7, 9):
        with pytest.raises(JobError, match="7 workers cannot be shared out"):
            Elastic(7, 8 if there == 7 else 7, plan_of, Nodes()).chosen(there)


def test_a_job_waits_for_its_least_number_of_workers_and_says_so_once() -> None:
    said: list[str] = []
    plan = Elastic(3, 4, plan_of, Nodes([0, 1, 2, 3])).plan(said.append)
    assert plan.workers == 3
    assert said == ["waiting for workers: the cluster has room for 0, cluster.workers.min is 3"]


def progress(folder: RunFolder, step: int, **changed: object) -> None:
    folder.path.mkdir(exist_ok=True)
    write_json(folder.progress, {"attempt": 1, "phase": "train", "step": step, "steps_total": 1000} | changed)


def test_what_is_left_is_reckoned_from_the_progress_of_the_attempt(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    pace = Pace(folder, 1)
    assert pace.left_s() == 0
    began = time.monotonic()
    for step, changed in ((7, {"attempt": 2}), (8, {"phase": "evaluate"}), (10, {})):
        progress(folder, step, **changed)
        assert pace.left_s() == 0, "nobody can say yet"
    time.sleep(0.1)
    progress(folder, 20)
    left_s = pace.left_s()
    # 980 steps at the pace of the last ten.
    assert 98 * 0.1 <= left_s <= 98 * (time.monotonic() - began)


@pytest.mark.parametrize(
    ("free", "least_left_s", "grows"), [(1, 5.0, True), (0, 5.0, False), (1, 1e9, False), (-1, 5.0, False)]
)
def test_an_attempt_is_stopped_for_a_larger_one_that_is_worth_a_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, least_left_s: float, grows: bool
) -> None:
    monkeypatch.setattr(elastic, "_WORTH_S", least_left_s)
    folder, nodes = RunFolder(tmp_path / "run"), Nodes(free=0)
    job = Elastic(1, 2, plan_of, nodes)
    progress(folder, 0)
    ended = threading.Event()
    with job.watching(plan_of(1), folder, 1):
        for step in range(1, 16):
            time.sleep(0.02)
            progress(folder, step)
        assert not job.grows
        nodes.free = free
        if grows:
            wait_until(lambda: job.grows and folder.stop_file(1).exists())
        else:
            assert not ended.wait(0.3)
    assert (job.grows, folder.stop_file(1).exists()) == (grows, grows)
    nodes.rooms = [2]
    job.plan(print)
    assert not job.grows, "a stop of the next attempt is the user's"


@pytest.mark.parametrize(
    ("workers", "nodes"),
    [(1, Nodes(free=7, flickers=True)), (6, Nodes(free=1))],
    ids=["comes and goes", "fits nowhere"],
)
def test_room_that_does_not_last_or_makes_no_larger_plan_is_not_worth_a_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, nodes: Nodes
) -> None:
    """Seven workers cannot share out the layers, so one more than six is of no use."""
    monkeypatch.setattr(elastic, "_WORTH_S", 0.0)
    folder = RunFolder(tmp_path / "run")
    job = Elastic(1, 8, plan_of, nodes)
    progress(folder, 0)
    with job.watching(plan_of(workers), folder, 1):
        step = 0
        while nodes.looks < 8 and not job.grows:
            progress(folder, step := step + 1)
            time.sleep(0.005)
    assert not job.grows
    assert not folder.stop_file(1).exists()


def test_an_attempt_of_all_workers_is_not_watched(tmp_path: Path) -> None:
    job = Elastic(1, 2, plan_of, Nodes(free=9))
    with job.watching(plan_of(2), RunFolder(tmp_path), 1):
        assert "elastic" not in [thread.name for thread in threading.enumerate()]


class ToldWhileItGrows(LocalContext):
    """A worker whose user presses Ctrl-C when it was already asked to leave, to start again with more."""

    folder: ClassVar[RunFolder]

    def stop_requested(self) -> bool:
        if self.folder.stop_file(1).exists() and not self.stop[0]:
            self.stop[0] = True
            os.kill(os.getpid(), signal.SIGINT)
        return False


def test_a_user_who_stops_a_run_that_is_about_to_grow_has_stopped_it(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "_WORTH_S", 0.0)
    monkeypatch.setattr(
        driver, "elastic_of", lambda cluster, session, plan_of: Elastic(1, 2, plan_of, Nodes([1, 2], free=1))
    )
    monkeypatch.setattr(attempt, "LocalContext", ToldWhileItGrows)
    ToldWhileItGrows.folder = RunFolder(tmp_path / "runs" / "tiny")
    done = in_process("run", tiny_job(), "--set", "train.global_batch_size=4", "--set", "train.epochs=20")
    assert done.returncode == EXIT_INTERRUPTED, done.stdout + done.stderr
    assert "SIGINT: saving at the end of this step" in done.stdout
    assert "starting again" not in done.stdout
    assert len(read_json(ToldWhileItGrows.folder.attempts)) == 1
