"""A crash that comes again, and a checkpoint that goes away between the decision and its use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import EXIT_CHECKPOINT, EXIT_OTHER, OrchestratorError
from orchestrator.job.load import load_job
from orchestrator.launch.driver import run_job
from orchestrator.launch.workers import local
from orchestrator.run.context import LocalContext
from orchestrator.run.worker import Assignment
from tests.conftest import TINY_JOB, Command
from tests.runs import newest

# Its steps are part of the weights, so that it breaks at the same one after every new start.
BREAKS = """\
import torch
from torch import nn
from torch.nn import functional as F

from hff.objectives import Head


class Breaks(Head):
    def __init__(self, features, num_classes, *, grid):
        super().__init__(features, num_classes, grid)
        self.linear = nn.Linear(features, num_classes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def logits(self, feature_BD):
        return self.linear(feature_BD)

    def loss(self, logit_BC, target_B):
        self.steps += 1
        if self.steps == 21:
            raise ValueError("this recipe breaks")
        return F.cross_entropy(logit_BC, target_B, reduction="none")
"""


def test_the_same_crash_at_the_same_step_twice_ends_the_run_with_its_first_cause_and_its_images(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(BREAKS)
    job = tiny_job(
        "breaks", TINY_JOB.replace("{{name: hff, prototypes_per_class: 2}}", "{{file: mine.py, class: Breaks}}")
    )
    result = in_process("run", job, "--set", "cluster.max_failures=100")
    assert result.returncode == EXIT_OTHER, result.stdout + result.stderr
    lines = result.stderr.splitlines()
    assert lines[0] == "worker 0: ValueError: this recipe breaks"
    assert "The same failure at the same step twice: stopping." in lines
    assert lines[-1] == "First cause: worker 0: ValueError: this recipe breaks (at step 20)"
    (where,) = [line for line in lines if line.startswith("at step ")]
    assert re.fullmatch(r"at step 20; images of that batch: (\d+, ){4}\.\.\. \(100\)", where), where
    attempts = json.loads((tmp_path / "runs" / "breaks" / "attempts.json").read_text())
    assert [attempt["first_step"] for attempt in attempts] == [0, 14], "two of a hundred and one"


def test_the_cause_is_told_where_its_report_cannot_be_written(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(BREAKS)
    job = tiny_job(
        "breaks", TINY_JOB.replace("{{name: hff, prototypes_per_class: 2}}", "{{file: mine.py, class: Breaks}}")
    )
    (tmp_path / "runs" / "breaks").mkdir(parents=True)
    (tmp_path / "runs" / "breaks" / "failures").symlink_to("gone")  # no folder can be made there
    result = in_process("run", job, "--set", "cluster.max_failures=0")
    assert result.returncode == EXIT_OTHER
    assert result.stderr.startswith("this recipe breaks"), result.stderr


def test_a_worker_never_chooses_another_checkpoint_than_the_one_that_was_decided_for_all(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    """Else two workers could go on from different steps."""
    path, run = tiny_job("goes"), tmp_path / "runs" / "goes"
    assert in_process("run", path, "--set", "checkpoint.keep_last=2").returncode == 0
    (run / "summary.json").unlink()
    decided = newest(run)

    def loses_a_file(assignment: Assignment) -> None:
        assert assignment.resume_from == str(decided)
        (decided / "layer_01.safetensors").unlink()
        local.run_here(assignment, LocalContext())

    with pytest.raises(OrchestratorError, match=r"layer_01.safetensors: does not fit layer 1") as caught:
        run_job(load_job(path), say=lambda _: None, launch=loses_a_file)
    assert caught.value.exit_code == EXIT_CHECKPOINT
    assert not (run / "summary.json").exists()
