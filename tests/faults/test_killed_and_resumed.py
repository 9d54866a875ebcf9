"""Killed twice and gone on with other numbers of workers and stages: the same bits as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Command, started
from tests.processes import Descendants
from tests.runs import assert_same_bits, summary_of, wait_for_step

LONG = ("train.epochs=40", "checkpoint.every_steps=20")
# Attempts of 2, 1 and 2 workers; every stage has one replica throughout.
SHAPES = ((2, 2), (1, 1), (2, 2))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_on_two_workers_then_on_one_ends_on_two_with_the_same_bits(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    job = tiny_job("killed")
    run = tmp_path / "runs" / "killed"
    killed: list[Descendants] = []
    for attempt, (workers, stages) in enumerate(SHAPES):
        shape = (f"cluster.workers={workers}", f"cluster.stages={stages}")
        flags = [word for setting in (*LONG, *shape) for word in ("--set", setting)]
        with started("run", job, *flags) as driver, Descendants(driver.pid) as processes:
            if attempt == len(SHAPES) - 1:
                out, err = driver.communicate(timeout=400)
                assert driver.returncode == 0, out + err
                continue
            wait_for_step(run, 150 * (attempt + 1))
            os.kill(driver.pid, signal.SIGKILL)
            driver.communicate(timeout=60)
        killed.append(processes)
        time.sleep(1)
    assert [name for processes in killed for name in processes.left()] == []
    plain = in_process("run", tiny_job("plain"), *(word for setting in LONG for word in ("--set", setting)))
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert_same_bits(run, tmp_path / "runs" / "plain")
    summary = summary_of(run)
    assert summary["attempts"] == len(SHAPES)
    assert all(first > 0 for first, _ in summary["attempt_steps"][1:]), "every attempt went on"
