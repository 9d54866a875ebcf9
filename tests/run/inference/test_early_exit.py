"""`orchestrator eval --early-exit`: the curve of a real run, and runs that cannot have one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import EXIT_DONE, EXIT_JOB
from tests.conftest import TINY_JOB, Command
from tests.runs import summary_of

VOTING = TINY_JOB.replace("head_grid: 4}}", "head_grid: 4, vote: fitted}}")


def test_the_curve_goes_from_the_whole_network_to_less_compute(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    assert in_process("run", tiny_job("tiny", VOTING)).returncode == EXIT_DONE
    run, answer = tmp_path / "runs" / "tiny", tmp_path / "answer.json"
    done = in_process("eval", run, "--early-exit", "--json", answer)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "early exit, calibrated on " in done.stdout
    found = json.loads(answer.read_text())["early_exit"]
    summary = summary_of(run)
    assert found["top1"] == summary["val_top1"]
    assert found["samples"] == 450
    computes = [row["compute"] for row in found["curve"]]
    assert computes == sorted(computes, reverse=True)
    assert computes[-1] < 1
    for row in found["curve"]:
        assert sum(row["leaving"]) == pytest.approx(1)
        assert row["lost"] == pytest.approx(found["top1"] - row["top1"])
    strictest, *_ = found["curve"]
    assert strictest["held_out_top1"] >= found["curve"][-1]["held_out_top1"]


def test_a_run_without_calibration_is_refused(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    assert in_process("run", tiny_job(), "--set", "train.epochs=1").returncode == EXIT_DONE
    run = tmp_path / "runs" / "tiny"
    done = in_process("eval", run, "--early-exit")
    assert done.returncode == EXIT_JOB
    assert done.stderr.strip() == (
        f"{run}: early exit needs training images that no layer has learned from, and this run held out none; "
        "train with model.vote: fitted (it holds out train.vote_from_train of them)"
    )


def test_a_network_of_one_layer_has_no_early_exit(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    text = VOTING.replace("[8, 8, 16], pool_after: [1]", "[8]").replace("epochs: 2", "steps: 3")
    assert in_process("run", tiny_job("tiny", text)).returncode == EXIT_DONE
    done = in_process("eval", tmp_path / "runs" / "tiny", "--early-exit")
    assert done.returncode == EXIT_JOB
    assert "needs a network of at least 2 layers with heads, this one has 1" in done.stderr
