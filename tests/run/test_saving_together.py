"""Two stages save beside the training: one checkpoint of both, or a failure that both know of."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest

from hff import HeadOptions, VggOptions, build_layers
from orchestrator.errors import OrchestratorError
from orchestrator.run import checkpoint
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder
from orchestrator.run.saving import Saver
from tests.pipeline.ranks import run_ranks
from tests.stages import lone_stage
from tests.stores import wait_until

LIMIT = 1000  # bytes; the files of both layers are larger


def _saver(rank: int, folder: RunFolder) -> Saver:
    (layer,) = build_layers(VggOptions(widths=(4, 5)), (3, 8, 8), HeadOptions(num_classes=3), seed=0, only=[rank])
    stage = lone_stage([layer], first=rank)
    own = Control(2)
    return Saver(folder, 1, stage, own, writes=True, leads=rank == 0, keep_last=2, background=True)


def _with_one_slow_disk(rank: int, path: str) -> dict[str, Any]:
    folder, moves, write = RunFolder(Path(path)), Path(path) / "moves", checkpoint.save_file

    def slowly(*arguments: Any) -> None:
        wait_until(moves.exists)
        write(*arguments)

    if rank == 1:
        checkpoint.save_file = slowly
    loop, saver = Control(2), _saver(rank, folder)
    saver.save(7, {"step": 7}, must=False)
    gathered = [loop.gather((step, rank)) for step in range(20)]
    before = checkpoint.steps_found(folder)
    loop.gather(None)
    moves.touch()
    saver.drain()
    saver.check()
    loop.gather(None)
    return {"gathered": gathered, "before": before, "after": checkpoint.steps_found(folder)}


def test_workers_talk_while_a_save_waits_for_the_slowest_disk_and_it_counts_when_all_is_there(tmp_path: Path) -> None:
    for found in run_ranks(2, _with_one_slow_disk, str(tmp_path)):
        assert found["gathered"] == [[(step, 0), (step, 1)] for step in range(20)]
        assert found["before"] == [], "one stage alone is no checkpoint"
        assert found["after"] == [7]
    whole, warnings = checkpoint.newest_valid(RunFolder(tmp_path))
    assert whole is not None
    assert warnings == []
    assert {path.name for path in whole.glob("layer_*")} == {
        "layer_00.safetensors", "layer_00.optim.safetensors", "layer_01.safetensors", "layer_01.optim.safetensors",
    }  # fmt: skip


def _with_one_full_disk(rank: int, path: str) -> str:
    saver = _saver(rank, RunFolder(Path(path)))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    for step in (1, 2, 3):
        saver.save(step, {"step": step}, must=False)
    try:
        while True:  # the steps after it: each worker learns of it at one of its own
            saver.check()
            time.sleep(0.01)
    except OrchestratorError as error:
        return str(error)


@pytest.mark.timeout(120)
def test_the_third_failure_of_one_worker_ends_all_of_them_with_its_reason(tmp_path: Path) -> None:
    first, second = run_ranks(2, _with_one_full_disk, str(tmp_path))
    assert first == second
    assert first.startswith("the checkpoint of step 3 could not be written: ")
    assert "(3 failures in a row); make room in" in first
    folder = RunFolder(tmp_path)
    assert len([event for event in folder.read_events()[0] if event["event"] == "warning"]) == 2
    assert list(folder.checkpoints.iterdir()) == [], "nothing torn is left"


def _beside_one_that_hangs(rank: int, path: str) -> float:
    control, ended = Control(2, timeout_s=2.0), Path(path) / "ended"
    began = time.monotonic()
    if rank == 1:
        wait_until(ended.exists)
        return 0.0
    with pytest.raises(RuntimeError):
        control.gather(None)
    ended.touch()
    return time.monotonic() - began


@pytest.mark.timeout(120)
def test_a_worker_that_hangs_between_steps_is_given_up_after_the_time_out(tmp_path: Path) -> None:
    seconds, _ = run_ranks(2, _beside_one_that_hangs, str(tmp_path))
    assert 1.5 < seconds < 20
