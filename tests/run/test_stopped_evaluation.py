"""A stop does not wait for an evaluation: the run leaves at once, and goes on to the same bits and accuracy."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EXIT_DONE, EXIT_INTERRUPTED
from orchestrator.launch import attempt
from orchestrator.run import checkpoint
from orchestrator.run.context import LocalContext
from orchestrator.run.folder import RunFolder
from tests.conftest import TINY_JOB, Command, environment, started
from tests.runs import assert_same_bits, summary_of

# Slow to evaluate where the environment wants it: 112 batches take a minute.
SLOW = """\
import os
import time

import hff
from torch import nn


class Nap(nn.Module):
    def forward(self, x):
        if not self.training:
            time.sleep(float(os.environ.get("NAP_S", "0")))
        return x


class Slow(hff.Architecture):
    depth = 2

    def body(self, index, input_shape):
        return nn.Sequential(nn.Flatten(), nn.Linear(size(input_shape), 8), Nap())


def size(shape):
    return shape[0] if len(shape) == 1 else shape[0] * shape[1] * shape[2]
"""
JOB = TINY_JOB.replace(
    "{{arch: vgg, widths: [8, 8, 16], pool_after: [1], head_grid: 4}}", "{{file: net.py, class: Slow}}"
).replace("global_batch_size: 100", "global_batch_size: 4")


def evaluating(run: Path, epochs_done: int) -> bool:
    try:
        progress = json.loads((run / "progress.json").read_text())
    except FileNotFoundError:
        return False
    return progress.get("phase") == "evaluate" and progress["step"] == epochs_done * progress["steps_total"] // 2


@pytest.mark.parametrize(
    ("epochs_done", "mesh"),
    [
        (1, "{launcher: process, workers: 2, stages: 2}"),
        pytest.param(2, "{launcher: process, workers: 2, stages: 1}", marks=pytest.mark.slow),
    ],
    ids=["between epochs, two stages", "at the end, two replicas"],
)
def test_a_stop_ends_an_evaluation_and_the_run_goes_on_as_if_nothing_had_been(
    epochs_done: int, mesh: str, tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(SLOW)
    words = (
        "--set",
        f"cluster={mesh}",
        "--set",
        "checkpoint.every_epochs=5",
        "--set",
        f"train.eval_every_epochs={epochs_done}",
    )
    undisturbed = in_process("run", tiny_job("undisturbed", JOB), *words)
    assert undisturbed.returncode == EXIT_DONE, undisturbed.stderr
    path, run = tiny_job("stopped", JOB), tmp_path / "runs" / "stopped"
    with started("run", path, *words, env={**environment(), "NAP_S": "0.5"}) as process:
        until = time.monotonic() + 120
        while not evaluating(run, epochs_done):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        said, errors = process.communicate(timeout=120)
        assert process.returncode == EXIT_INTERRUPTED, said + errors
    assert not (run / "summary.json").exists()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["val_top1"] for event in events if event["event"] == "epoch"] == [None] * epochs_done
    done = in_process("run", path, *words)
    assert done.returncode == EXIT_DONE, done.stderr
    assert summary_of(run)["attempts"] == 2
    assert_same_bits(run, tmp_path / "runs" / "undisturbed")


class StopsInEvaluation(LocalContext):
    """Its 14 steps of an epoch ask whether to stop, then the evaluation does."""

    asked = 0

    def stop_requested(self) -> bool:
        self.asked += 1
        return self.asked > 14


def test_a_stop_in_an_evaluation_saves_again_where_the_save_before_it_failed(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That save was in the background, where a failure is a warning."""
    monkeypatch.setattr(attempt, "LocalContext", StopsInEvaluation)
    write, calls = checkpoint.save_file, []

    def full_at_first(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", full_at_first)
    done = in_process("run", tiny_job())
    assert done.returncode == EXIT_INTERRUPTED, done.stderr
    assert "was stopped after step 14 and saved" in done.stderr
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert checkpoint.steps_found(run) == [14]
    assert [e["event"] for e in run.read_events()[0] if e["event"] in ("warning", "checkpoint")] == [
        "warning",
        "checkpoint",
    ]
