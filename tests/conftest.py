"""Shared by all tests: a small job on the embedded digits, and the command line as a user calls it."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.data.stores.run_store import RunStore
from tests.stores import BUCKET, Bucket, Door, door

# A shell gives its background jobs an ignored Ctrl-C, which they would hand on to what the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
TEST_DATA = Path(os.environ.get("ORCHESTRATOR_TEST_DATA", ROOT.parent / "shared" / "data"))

TINY_JOB = """\
#!/usr/bin/env -S python -m orchestrator run
kind: train
name: {name}
runs: {runs}
data: digits
model: {{arch: vgg, widths: [8, 8, 16], pool_after: [1], head_grid: 4}}
objective: {{name: hff, prototypes_per_class: 2}}
train: {{epochs: 2, global_batch_size: 100, optimizer: adamw, lr: 5.0e-3}}
cluster: {{launcher: process, workers: 1, stages: 1, threads_per_worker: 1, timeout_s: 60, max_failures: 0}}
"""

# Of summary.json, for every kind of launcher.
SUMMARY_KEYS = {
    "name", "kind", "status", "run_id", "seed", "epochs", "steps", "samples_seen", "samples_per_epoch",
    "val_top1", "val_top5", "test_top1", "test_top5", "layers", "images_per_second", "wall_seconds", "world_size",
    "stages", "replicas", "pipeline_efficiency", "peak_memory_bytes", "attempts", "attempt_steps",
    "skipped_samples", "weights_sha256", "sample_keys_sha256", "order_sha256", "job_sha256", "index_sha256",
    "git_commit", "versions",
}  # fmt: skip

Command = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """What a user's shell has, with the environment active and without traces of the test runner."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RAY_", "MLFLOW_", "OMP_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "120",
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the files that the table of faults in docs/reliability.md names."""
    faults, _, _ = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition("\n## Bad input")
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", faults))
    for item in items:
        if item.path.relative_to(ROOT).as_posix() in named:
            item.add_marker("faults")


@pytest.fixture(scope="session")
def shared_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MLflow database for all tiny jobs: making one takes longer than such a job trains."""
    return tmp_path_factory.mktemp("tracking") / "mlflow.db"


@pytest.fixture
def tiny_job(tmp_path: Path, shared_database: Path) -> Callable[..., Path]:
    """A job file of seconds: three small convolutions on digits, two epochs."""

    def write(name: str = "tiny", text: str = TINY_JOB) -> Path:
        path = tmp_path / f"{name}.yaml"
        tracking = f"tracking: {{uri: sqlite:///{shared_database}}}\n"
        path.write_text(text.format(name=name, runs=tmp_path / "runs") + tracking)
        return path

    return write


@pytest.fixture
def orchestrator() -> Command:
    """The command line in a process of its own."""

    def call(
        *arguments: str | Path, timeout: float = 240, prefix: Sequence[str] = (), cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        command = [*(prefix or (sys.executable,)), "-m", "orchestrator", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment(), cwd=cwd)

    return call


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process: it saves seconds of imports where a process of its own proves nothing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def started_bucket() -> Iterator[Bucket]:
    """One S3 server for all tests: starting it takes longer than most of them."""
    bucket = Bucket()
    yield bucket
    bucket.close()


@pytest.fixture
def bucket(started_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The S3 server, with credentials for it in the environment."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return started_bucket


@pytest.fixture
def before(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """The S3 server behind a door that can be made to fail."""
    with door(bucket.port) as before:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{before.port}")
        yield before


@pytest.fixture
def store(before: Door, tmp_path: Path) -> RunStore:
    """A place for runs behind the door."""
    return RunStore(f"s3://{BUCKET}/{tmp_path.name}")


@contextmanager
def started(*arguments: str | Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process, and a process group, of its own while the test goes on; ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        cwd=ROOT,
        env=env or environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
