"""The real thing: Ray Train workers, a Ray cluster started by hand, jobs submitted to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command, environment

BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]


def test_quickstart_on_two_ray_workers_reaches_its_accuracy(orchestrator: Command, tmp_path: Path) -> None:
    summary_file = tmp_path / "summary.json"
    result = orchestrator(
        "run", "jobs/quickstart.yaml", "--set", f"runs={tmp_path / 'runs'}", "--summary", summary_file
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(summary_file.read_text())
    assert summary["val_top1"] >= 0.97
    assert (summary["world_size"], summary["stages"]) == (2, 2)
    assert "Traceback" not in result.stdout + result.stderr
    assert "Warning" not in result.stderr


class Cluster:
    """`ray start --head` as a user would type it in the repository, stopped by its process id."""

    def __init__(self, folder: Path) -> None:
        self.port, dashboard, client = _free_ports(3)
        self.environment = {
            **environment(),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "HOME": str(folder),
        }
        self.process = subprocess.Popen(
            [
                BIN / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={self.port}",
                f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
                "--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={folder / 'ray'}",
            ],
            cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def submit(self, *words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), "job", "submit", *words]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def stop(self) -> None:
        # Its own session holds every process that it started, and nobody else's.
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)

    def wait(self) -> None:
        until = time.monotonic() + 90
        url = self.environment["RAY_API_SERVER_ADDRESS"]
        while time.monotonic() < until:
            done = subprocess.run(
                [BIN / "ray", "job", "list", "--address", url],
                env=self.environment,
                capture_output=True,
                cwd=ROOT,
            )
            if done.returncode == 0:
                return
            time.sleep(1)
        raise AssertionError("the Ray cluster did not come up in 90 s")


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # Ray's sockets lie below its folder and a socket's path is limited to 107 bytes.
    folder = Path("/tmp") / f"orch-{os.getpid()}"
    folder.mkdir()
    started = Cluster(folder)
    try:
        started.wait()
        yield started
    finally:
        started.stop()
        subprocess.run(["rm", "-rf", str(folder)], check=False)


def test_ray_job_submit_of_the_job_file_itself_succeeds(cluster: Cluster) -> None:
    runs = Path(cluster.environment["HOME"]) / "orchestrator-runs"
    by_file = cluster.submit("--working-dir", ".", "--", "jobs/quickstart.yaml")
    assert by_file.returncode == 0, by_file.stdout + by_file.stderr
    assert "succeeded" in by_file.stdout + by_file.stderr
    summary = json.loads((runs / "quickstart" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["val_top1"] >= 0.97


def test_a_failing_job_ends_with_our_message_and_our_exit_code(cluster: Cluster) -> None:
    failed = cluster.submit("jobs/quickstart.yaml --set train.lr=-1")
    assert failed.returncode != 0
    tail = "\n".join((failed.stdout + failed.stderr).splitlines()[-12:])
    assert "--set: train.lr: must be" in tail
    assert "exit code 2" in failed.stdout + failed.stderr
