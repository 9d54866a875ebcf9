"""What is said of runs that are not finished: failed, killed, stopped; and of folders without any run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.run.folder import RunFolder
from orchestrator.show.terminal import program
from tests.conftest import TINY_JOB, Command
from tests.run.test_own_objective import GOOD
from tests.show.listings.test_runs import made

FAILING = GOOD.replace(
    "    def loss(",
    """\
    steps = 0

    def loss(self, logit_BC, target_B):
        Squares.steps += 1
        if Squares.steps == int(__import__("os").environ.get("FAIL_AT", 0)):
            raise ValueError("the loss is too high\\nand more")
        return self.loss_of(logit_BC, target_B)

    def loss_of(""",
)
JOB = TINY_JOB.replace("{{name: hff, prototypes_per_class: 2}}", "{{file: mine.py, class: Squares}}")
ERROR = "worker 0: ValueError: the loss is too high"


def test_a_failed_run_says_why_and_how_far_it_came_until_it_is_finished(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(FAILING)
    job, run = tiny_job(text=JOB), tmp_path / "runs" / "tiny"
    monkeypatch.setenv("FAIL_AT", "25")
    flags = ("--set", "checkpoint.every_steps=5", "--set", "train.epochs=1")
    failed = in_process("run", job, *flags)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    listed = in_process("runs", "ls", run.parent).stdout
    assert listed.splitlines()[1].startswith("tiny  failed at step 8/14  ")
    assert listed.splitlines()[2:] == [f"tiny: {ERROR}"]
    (row,) = json.loads(in_process("runs", "ls", run.parent, "--json").stdout)
    assert (row["status"], row["error"]) == ("failed at step 8/14", ERROR)
    shown = in_process("runs", "show", run).stdout.splitlines()
    assert shown[:2] == ["tiny: failed at step 8/14", f"  error: {ERROR}"]
    assert "The run is not finished: its newest weights are of step 5 of 14.\n" in in_process("eval", run).stdout
    assert in_process("report", run).returncode == 0
    page = (run / "report.html").read_text()
    assert f"<p>It failed: {ERROR}</p><p>The run is not finished: its newest weights are of step 5 of 14.</p>" in page

    monkeypatch.delenv("FAIL_AT")
    assert in_process("run", job, *flags).returncode == 0
    (row,) = json.loads(in_process("runs", "ls", run.parent, "--json").stdout)
    assert (row["status"], row["error"]) == ("finished", None)
    assert "not finished" not in in_process("eval", run).stdout
    assert in_process("report", run).returncode == 0
    assert "It failed" not in (run / "report.html").read_text()


def test_a_failure_is_that_of_the_last_attempt_alone(tmp_path: Path) -> None:
    folder = RunFolder(made(tmp_path, "run"))
    attempts = [{"attempt": 1, "first_step": 0, "last_step": None, "run_id": "x"}]
    folder.write_failure("Ray did not start")
    assert folder.failure() == "Ray did not start"
    folder.attempts.write_text(json.dumps(attempts))
    assert folder.failure() is None, "it is being tried again, or that attempt was killed"
    folder.write_failure("no memory")
    assert folder.failure() == "no memory"
    folder.outcome.write_text('{"attempt": 1, "status": "interrupted", "step": 3}')
    assert folder.failure() is None


def test_a_folder_without_runs_is_said_with_where_to_look_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = "; orchestrator runs ls RUNS looks elsewhere: in what a job says as `runs`, a folder (by default runs/"
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "ls"]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}/runs: no such folder of runs{elsewhere}")
    (tmp_path / "runs").mkdir()
    assert main(["runs", "ls"]) == 0
    assert capsys.readouterr().out.startswith(f"No runs in {tmp_path}/runs{elsewhere}")
    assert main(["runs", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    run = made(tmp_path / "runs", "one")
    assert main(["runs", "ls", str(run)]) == 2
    assert capsys.readouterr().err == f"{run}: is a run itself; orchestrator runs show {run} describes it\n"


def test_runs_of_the_project_around_are_found_from_a_folder_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").touch()
    made(tmp_path / "runs", "one")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert main(["runs", "ls"]) == 0
    assert "one  before its first step" in capsys.readouterr().out


def test_a_proposed_command_works_when_it_is_pasted_with_and_without_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}/usr/bin:/bin")
    assert program("orchestrator") == "orchestrator"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    assert program("orchestrator") == str(here / "orchestrator"), "this folder is not the project's"
    monkeypatch.chdir(here.parent.parent)
    assert program("orchestrator") == f"{here.parent.name}/bin/orchestrator"
    done = subprocess.run([program("orchestrator") + " --help"], shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout[:6]) == (0, "usage:")
    assert program("no-such-program") == "no-such-program"
