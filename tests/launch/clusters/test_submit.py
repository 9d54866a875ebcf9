"""What is sent to a cluster, what never is, and what comes back as exit code."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.errors import Interrupted, JobError, OrchestratorError
from orchestrator.launch.clusters import package, submit
from orchestrator.launch.clusters.package import choose_files, copy_to
from orchestrator.launch.clusters.submit import plan_submission
from tests.conftest import ROOT

JOB = """\
kind: train
name: far
data: {train: shards/train, val: /elsewhere/val, image_size: 8, channels: 1}
model: {arch: mlp, widths: [8]}
objective: {name: hff}
train: {epochs: 1, global_batch_size: 50, lr: 1e-3}
cluster: {timeout_s: 100.5}
"""
KEPT = (
    "pyproject.toml",
    "jobs/far.yaml",
    "code/data/reader.py",
    "code/runs.py",
    "token_ring.py",
    "docs/environment.md",
)
LEFT = (
    "data/x.jpg", "runs/far/job.yaml", "shards/train/index.json", "shards/train/00000.tar", "old.tar.gz", "mlflow.db",
    ".env", ".env.local", "certs/server.pem", "code/deploy.key", "home/.ssh/config", "home/.aws/credentials",
    "id_rsa.pub", "secrets.yaml", "Credentials.json", "kubeconfig-prod", ".netrc", "service-account-1.json",
    ".git/config", ".venv/bin/python", "venv/x", "node_modules/y.js", "code/__pycache__/a.pyc", "x.egg-info/PKG-INFO",
    ".mypy_cache/z",
)  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for name in (*KEPT, *LEFT):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "jobs" / "far.yaml").write_text(JOB)
    return root


def test_code_and_jobs_travel_and_data_secrets_git_and_environments_do_not(project: Path, tmp_path: Path) -> None:
    chosen = choose_files(project, [project / "shards" / "train"])
    assert set(chosen.files) == set(KEPT)
    assert chosen.bytes == sum((project / name).stat().st_size for name in KEPT)
    (project / "jobs" / "far.yaml").chmod(0o755)
    copy_to(chosen, tmp_path / "copy")
    copied = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    assert copied == set(KEPT)
    assert os.access(tmp_path / "copy" / "jobs" / "far.yaml", os.X_OK)


def test_in_a_git_repository_what_git_ignores_stays_too_and_what_is_tracked_but_secret_as_well(project: Path) -> None:
    (project / ".git" / "config").unlink()
    (project / ".gitignore").write_text("weights/\n")
    (project / "weights").mkdir()
    (project / "weights" / "w.bin").write_text("x")
    git = ["git", "-C", str(project), "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q"], check=True, capture_output=True)
    subprocess.run([*git, "add", "-f", ".env", "code/runs.py"], check=True, capture_output=True)
    assert set(choose_files(project, [project / "shards"]).files) == {*KEPT, ".gitignore"}


def test_links_out_of_the_directory_stay(project: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("mine")
    (project / "link.txt").symlink_to(tmp_path / "outside.txt")
    (project / "inner.py").symlink_to(project / "code" / "runs.py")
    files = choose_files(project, [project / "shards"]).files
    assert "link.txt" not in files
    assert "inner.py" in files


def test_more_than_ray_takes_is_refused_with_the_largest_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MOST_BYTES", 3 * 2**20)
    (project / "code" / "big.bin").write_bytes(bytes(4 * 2**20))
    with pytest.raises(JobError) as refused:
        choose_files(project)
    assert str(refused.value) == (
        f"{project}: has 4 MiB of files to upload, at most 3 MiB are taken; the largest is code/big.bin: move data to "
        "storage that the cluster sees, or name it in .gitignore"
    )


def test_the_command_runs_the_job_on_data_of_this_machine_and_leaves_time_to_save(project: Path) -> None:
    planned = plan_submission(str(project / "jobs" / "far.yaml"), ["train.lr=2e-3", "name=a"], "must")
    assert shlex.split(planned.entrypoint) == [
        "python", "-m", "orchestrator", "run", "jobs/far.yaml", "--set", "train.lr=2e-3", "--set", "name=a",
        "--set", f"data.train={project / 'shards' / 'train'}", "--resume", "must",
    ]  # fmt: skip
    assert planned.name == "a"
    assert int(planned.env_vars["RAY_JOB_STOP_WAIT_TIME_S"]) == 161
    assert set(planned.package.files) == set(KEPT)


def test_a_dry_run_says_what_would_be_sent_without_ray(project: Path) -> None:
    code = (
        "import sys; from orchestrator.cli import main; "
        f"code = main(['submit', {str(project / 'jobs' / 'far.yaml')!r}, '--dry-run']); "
        "sys.exit(code or len({'ray', 'torch', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Command      python -m orchestrator run jobs/far.yaml --set data.train=")
    assert lines[1].startswith(f"Directory    {project}: {len(KEPT)} files, 0.00 MB")
    assert lines[2:] == ["Environment  RAY_JOB_STOP_WAIT_TIME_S=161", "Nothing was sent (--dry-run)."]


def test_a_bad_job_or_target_is_refused_before_anything_is_sent(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = str(project / "jobs" / "far.yaml")
    assert main(["submit", job, "--set", "train.lr=-1"]) == 2
    assert capsys.readouterr().err == "--set: train.lr: must be > 0, got -1\n"
    assert main(["submit", job, "--to", "cloud"]) == 2
    assert "argument --to: invalid choice: 'cloud'" in capsys.readouterr().err


class RayJob:
    """Ray's job client after a submission, as far as its answers matter: statuses in order, then the last again."""

    def __init__(self, *statuses: str, code: int | None = None, message: str = "") -> None:
        from ray.job_submission import JobStatus

        self.statuses = [JobStatus(status) for status in statuses]
        self.code, self.message = code, message

    def get_job_info(self, submission: str) -> Any:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return SimpleNamespace(status=status, driver_exit_code=self.code, message=self.message)

    async def tail_job_logs(self, submission: str) -> AsyncIterator[str]:
        yield "epoch 1\n"
        raise RuntimeError("connection closed")


@pytest.mark.filterwarnings("ignore")  # of Ray's own imports
@pytest.mark.parametrize(
    ("job", "code"),
    [
        (("RUNNING", "SUCCEEDED", 0), 0),
        (("FAILED", 3), 3),
        (("FAILED", 75), 75),
        (("FAILED", -9), 1),
    ],
)
def test_the_exit_code_is_the_drivers(job: tuple[Any, ...], code: int) -> None:
    assert submit._conclude(RayJob(*job[:-1], code=job[-1]), "far-1") == code


@pytest.mark.filterwarnings("ignore")  # of Ray's own imports
def test_a_stopped_job_is_an_interruption_and_one_that_never_ran_says_why() -> None:
    with pytest.raises(Interrupted, match="far-1 was stopped; submit the same job again"):
        submit._conclude(RayJob("STOPPED"), "far-1")
    with pytest.raises(OrchestratorError, match="far-1 failed before its command ran: no such pip package"):
        submit._conclude(RayJob("FAILED", message="no such pip package"), "far-1")


@pytest.mark.filterwarnings("ignore")  # of Ray's own imports
def test_a_log_that_breaks_off_costs_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    import asyncio

    asyncio.run(submit._follow(RayJob("RUNNING"), "far-1"))
    assert capsys.readouterr().out == "epoch 1\nwarning: the log can no longer be followed: connection closed\n"
