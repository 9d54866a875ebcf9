"""What the thread beside the loop writes."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from orchestrator.pipeline.stage import StageTimes
from orchestrator.run import heartbeat
from orchestrator.run.context import LocalContext
from orchestrator.run.folder import RunFolder
from orchestrator.run.heartbeat import Heartbeat
from tests.stores import wait_until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PERIOD_S", 0.02)


def hang_in_a_function_with_a_name(ended: threading.Event) -> None:
    ended.wait(60)


def test_a_worker_that_makes_no_step_writes_where_its_threads_are(tmp_path: Path) -> None:
    folder, ended = RunFolder(tmp_path), threading.Event()
    stacks = folder.stacks_file(3, 1)
    thread = threading.Thread(target=hang_in_a_function_with_a_name, args=(ended,))
    thread.start()
    with Heartbeat(folder, 3, LocalContext(rank=1, world_size=2), stall_s=1.0) as beat:
        beat.state.update(phase="evaluate", step=7)
        time.sleep(1.3)
        assert not stacks.exists(), "an evaluation makes no steps"
        for step in range(8, 16):
            beat.state.update(phase="train", step=step)
            time.sleep(0.18)
        assert not stacks.exists(), "it goes on"
        wait_until(lambda: stacks.exists() and "hang_in_a_function_with_a_name" in stacks.read_text())
        assert stacks.read_text().startswith("rank 1: no step since step 15")
    ended.set()
    thread.join()


def test_a_stage_writes_what_it_does_with_its_time_since_the_last_look(tmp_path: Path) -> None:
    folder, times = RunFolder(tmp_path), StageTimes()

    def shares() -> dict[str, float]:
        values: dict[str, float] = json.loads(folder.stage_file(1).read_text())
        return values

    with Heartbeat(folder, 3, LocalContext(rank=1, world_size=2), stage=(1, lambda: times)) as beat:
        time.sleep(0.2)
        assert not folder.stage_file(1).exists(), "there was no step"
        beat.state.update(step=7)
        times = StageTimes(wall_s=10.0, wait_input_s=2.5, wait_output_s=5.0)
        wait_until(folder.stage_file(1).exists)
        assert shares() == {
            "attempt": 3, "step": 7, "busy_fraction": 0.25, "wait_input_fraction": 0.25, "wait_output_fraction": 0.5,
            "all_reduce_fraction": 0.0,
        }  # fmt: skip
        times = StageTimes(wall_s=12.0, wait_input_s=2.5, wait_output_s=5.0, wait_replicas_s=1.0)
        wait_until(lambda: shares()["all_reduce_fraction"] == 0.5)
        assert shares()["busy_fraction"] == 0.5, "of the two seconds since"
        times = StageTimes(wall_s=4.0, wait_input_s=1.0)  # an epoch has ended
        wait_until(lambda: shares()["busy_fraction"] == 0.75)


def test_the_wish_to_stop_is_passed_on_as_soon_as_the_disk_takes_it(tmp_path: Path) -> None:
    folder, context = RunFolder(tmp_path / "not there yet"), LocalContext(rank=1, world_size=2)
    with Heartbeat(folder, 3, context):
        context.stop[0] = True
        time.sleep(0.2)
        folder.path.mkdir()
        wait_until(folder.stop_file(3).exists)
