"""A worker that is killed ends the run at once, with the first cause first and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import started
from tests.processes import Descendants, workers
from tests.runs import wait_for_step


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_killed_stage_ends_all_within_the_time_out_and_is_named_first(
    tiny_job: Callable[..., Path], tmp_path: Path, transport: str
) -> None:
    flags = ["cluster.workers=3", "cluster.stages=3", f"cluster.transport={transport}", "train.epochs=500"]
    words = [word for flag in flags for word in ("--set", flag)]
    with started("run", tiny_job("dies"), *words) as process, Descendants(process.pid) as family:
        wait_for_step(tmp_path / "runs" / "dies", 20)
        ranks = workers(process.pid)
        assert len(ranks) == 3
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=120)
        assert time.monotonic() - killed < 60, "cluster.timeout_s"
        assert process.returncode == 1
        lines = err.splitlines()
        assert lines[0].startswith("worker 1 was ended by SIGKILL"), err
        consequences = [line for line in lines if line.startswith("  then worker ")]
        assert {line.split(":")[0] for line in consequences} <= {"  then worker 0", "  then worker 2"}
        assert consequences, err
        assert family.left() == []
