"""A worker is killed, hangs or is told to stop: all go on from one step, and the bits are those of a quiet run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY_JOB, Command, started
from tests.faults.test_crashes import BREAKS
from tests.processes import Descendants, workers
from tests.runs import assert_same_bits, summary_of, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
TWO = ("cluster.workers=2", "cluster.stages=2")


def flags(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_is_killed_starts_again_with_the_others_and_no_stale_activation_is_used(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, stage: int
) -> None:
    """Against one process: an activation of the dead attempt in the new one would give other bits."""
    long = ("train.epochs=60", "checkpoint.every_steps=25")
    run = tmp_path / "runs" / "killed"
    words = flags(*long, *TWO, "cluster.max_failures=1")
    with started("run", tiny_job("killed"), *words) as driver, Descendants(driver.pid) as family:
        wait_for_step(run, 100)
        os.kill(workers(driver.pid)[stage], signal.SIGKILL)
        out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, out + err
    assert f"warning: worker {stage} was ended by SIGKILL" in out
    assert "starting again from the newest checkpoint (failure 1 of 1)" in out
    assert family.left() == []
    (first, reached), (again, last) = summary_of(run)["attempt_steps"]
    assert 0 == first < again <= reached < last
    assert again >= 50, "at most the step that was being saved and those since are lost"
    assert in_process("run", tiny_job("plain"), *flags(*long)).returncode == 0
    assert_same_bits(run, tmp_path / "runs" / "plain")


def test_a_worker_that_hangs_is_named_with_its_stack_and_the_run_goes_on(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    hangs = BREAKS.replace('raise ValueError("this recipe breaks")', "hang_once()").replace(
        "class Breaks",
        "def hang_once():\n"
        "    import pathlib, time\n"
        f"    mark = pathlib.Path({str(tmp_path / 'hung')!r})\n"
        "    if not mark.exists():\n"
        "        mark.touch()\n"
        "        time.sleep(3600)\n\n\n"
        "class Breaks",
    )
    (tmp_path / "mine.py").write_text(hangs)
    text = TINY_JOB.replace("{{name: hff, prototypes_per_class: 2}}", "{{file: mine.py, class: Breaks}}")
    run = tmp_path / "runs" / "hangs"
    words = flags(*TWO, "cluster.max_failures=1", "cluster.timeout_s=20")
    with started("run", tiny_job("hangs", text), *words) as driver, Descendants(driver.pid) as family:
        out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, out + err
    assert (tmp_path / "hung").exists(), "it hung"
    assert "gave no activation for 20 s" in out
    stacks = (run / "failures" / "attempt-1-rank-0.stacks").read_text()
    assert stacks.startswith("rank 0: no step since step 20")
    assert "in hang_once" in stacks
    assert family.left() == []
    assert summary_of(run)["attempt_steps"] == [[0, 20], [14, 28]]
    assert in_process("run", tiny_job("plain", text)).returncode == 0
    assert_same_bits(run, tmp_path / "runs" / "plain")


@pytest.mark.parametrize("stage", [0, 1])
def test_one_worker_that_is_told_to_stop_takes_all_with_it_at_one_step(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, stage: int
) -> None:
    long = ("train.epochs=2", "train.global_batch_size=2", "train.lr=1e-3")
    run = tmp_path / "runs" / "told"
    command = ("run", tiny_job("told"), *flags(*long, *TWO))
    with started(*command) as driver, Descendants(driver.pid) as family:
        wait_for_step(run, 50)
        os.kill(workers(driver.pid)[stage], signal.SIGTERM)
        out, err = driver.communicate(timeout=120)
    assert driver.returncode == 75, out + err
    assert family.left() == []
    step = json.loads((run / "outcome.json").read_text())["step"]
    assert 50 <= step < 673, "in mid-epoch"
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{step:09d}"]
    assert in_process(*command[:2], *flags(*long)).returncode == 0
    assert in_process("run", tiny_job("plain"), *flags(*long)).returncode == 0
    assert_same_bits(run, tmp_path / "runs" / "plain")
    assert summary_of(run)["attempt_steps"] == [[0, step], [step, 2 * 673]]
