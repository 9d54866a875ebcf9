"""The real thing: Ray Train workers, a Ray cluster started by hand, jobs submitted to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.launch.workers import ray_train
from tests.conftest import ROOT, SUMMARY_KEYS, Command, environment, started
from tests.processes import Descendants, free_port, free_ports
from tests.runs import assert_same_bits, summary_of, wait_for_step

BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]


def test_quickstart_on_two_ray_workers_equals_one_process_and_leaves_no_process_behind(
    in_process: Command, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    job = ("run", "jobs/quickstart.yaml", "--set", f"runs={runs}")
    with (
        started(*job, "--summary", tmp_path / "summary.json") as process,
        Descendants(process.pid) as descendants,
    ):
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert "Traceback" not in output + errors
    assert "Warning" not in errors
    assert descendants.count("ray::RayTrainWorker") == 2, sorted(descendants.seen.values())
    assert descendants.count("ray::DatasetManager") == 0, "a process that has nothing to do"
    assert descendants.left() == []
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert summary["val_top1"] >= 0.97
    assert (summary["world_size"], summary["stages"]) == (2, 2)
    alone = ("name=alone", "cluster.launcher=process", "cluster.workers=1", "cluster.stages=1")
    result = in_process(*job, *(word for setting in alone for word in ("--set", setting)))
    assert result.returncode == 0, result.stderr
    assert_same_bits(runs / "quickstart", runs / "alone")


def test_ray_trains_controller_imports_no_torch_for_us() -> None:
    code = (
        "import sys, orchestrator.launch.workers.ray_group; print('ray.train' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_when_ray_trains_controller_is_killed_its_workers_places_come_back_and_the_run_goes_on(
    tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    settings = ("train.epochs=2", "train.global_batch_size=2", "train.lr=1e-3", "checkpoint.every_steps=10")
    settings += ("cluster.launcher=ray", "cluster.workers=2", "cluster.stages=2", "cluster.max_failures=1")
    run = tmp_path / "runs" / "tiny"
    with (
        started("run", tiny_job(), *(word for setting in settings for word in ("--set", setting))) as process,
        Descendants(process.pid) as descendants,
    ):
        wait_for_step(run, 100, timeout_s=300)
        (controller,) = (pid for (pid, _), name in descendants.seen.items() if name.startswith("ray::TrainController"))
        os.kill(controller, signal.SIGKILL)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    (first, at_kill), (again, last) = summary_of(run)["attempt_steps"]
    assert 0 == first < 10 <= again <= at_kill < last


@pytest.mark.slow
def test_a_run_on_ray_whose_mlflow_does_not_answer_says_so_and_leaves_no_worker(
    tiny_job: Callable[..., Path], tmp_path: Path
) -> None:
    port = free_port()
    settings = ("cluster.launcher=ray", "cluster.workers=2", f"tracking.uri=http://127.0.0.1:{port}")
    with (
        started("run", tiny_job(), *(word for setting in settings for word in ("--set", setting))) as process,
        Descendants(process.pid) as descendants,
    ):
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 1, output + errors
    assert f"tracking.uri: http://127.0.0.1:{port} cannot be used" in errors
    assert "Traceback" not in output + errors
    assert descendants.left() == []


@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_does_not_start_is_tried_twice_and_then_told_in_one_message(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """Ray's own words for a machine too busy to start it, as a bare Exception."""
    import ray

    calls: list[dict[str, object]] = []

    def start(**options: object) -> None:
        calls.append(options)
        if len(calls) <= failures:
            raise Exception("The current node timed out during startup.")

    for name in ray_train.ENVIRONMENT | ray_train.OWN_ENVIRONMENT:
        monkeypatch.setenv(name, "as the user wishes")  # and put back afterwards
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", start)
    session = ray_train.RaySession({"workers": 64, "cpus_per_worker": 1})
    if failures == 1:
        assert session.__enter__().own
    else:
        with pytest.raises(OrchestratorError, match=r"^a local Ray cannot be used: The current node timed out") as told:
            session.__enter__()
        assert str(told.value).endswith(
            "This machine is very busy: try again, or add --set cluster.launcher=process. Nothing is lost."
        )
    assert [(options["address"], options["num_cpus"]) for options in calls] == [("local", 64)] * 2


def test_ctrl_c_while_ray_starts_is_one_line_and_leaves_no_process_behind(
    tiny_job: Callable[..., Path],
) -> None:
    job = ("run", tiny_job(), "--set", "cluster.launcher=ray", "--set", "cluster.workers=2")
    with started(*job) as process, Descendants(process.pid) as descendants:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("Starting Ray on this machine"):
            assert process.poll() is None
        until = time.monotonic() + 60
        while descendants.count("") < 2 and time.monotonic() < until:  # its first process is there
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (
        75,
        "interrupted before the first step; nothing is lost, the same command starts again\n",
    )
    assert descendants.left() == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_ray_stopped_by_sigterm_in_mid_epoch_exits_75_and_goes_on_to_the_same_weights(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    long = ("train.epochs=2", "train.global_batch_size=2", "train.lr=1e-3")
    ray = ("cluster.launcher=ray", "cluster.workers=2", "cluster.stages=2")
    flags = [word for setting in long for word in ("--set", setting)]
    assert in_process("run", tiny_job("whole"), *flags).returncode == 0
    command = ("run", tiny_job("stopped"), *flags, *(word for setting in ray for word in ("--set", setting)))
    run = tmp_path / "runs" / "stopped"
    with started(*command) as process, Descendants(process.pid) as descendants:
        wait_for_step(run, 20, timeout_s=300)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, output + errors
    assert "run the same command again to go on" in errors
    assert "Traceback" not in output + errors
    assert descendants.left() == []
    with started(*command) as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert_same_bits(run, tmp_path / "runs" / "whole")
    (first, stopped), (went_on, last) = summary_of(run)["attempt_steps"]
    assert 0 == first < 20 <= stopped == went_on < last == 2 * 673
    assert stopped != 673, "stopped at an epoch's end: the test proves nothing"


class Cluster:
    """`ray start --head` as a user would type it in the repository, stopped by its process id.

    The repository is a copy, so that the literal job of the README does not touch the runs of this one.
    """

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "repository"
        for name in ("hff", "orchestrator", "jobs"):
            shutil.copytree(ROOT / name, self.repository / name)
        shutil.copy(ROOT / "pyproject.toml", self.repository)
        port, dashboard, client, agent = free_ports(4)
        self.url = f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **environment(),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": self.url,
            "HOME": str(folder),
        }
        self.process = subprocess.Popen(
            [
                BIN / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}",
                f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
                "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}",
                "--include-dashboard=true", f"--temp-dir={folder / 'ray'}",
            ],
            cwd=self.repository, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def submit(self, *words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), "job", "submit", *words]
        return subprocess.run(
            command,
            cwd=self.repository,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def stop(self) -> None:
        # Its own session holds every process that it started, and nobody else's.
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(8)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)

    @cached_property
    def client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.url)

    def wait(self) -> None:
        """The cluster is up when it takes a job; its agent comes later than its dashboard."""
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with suppress(OSError, RuntimeError):  # those of requests are OSErrors
                self.client.submit_job(entrypoint="true")
                return
            time.sleep(0.5)
        raise AssertionError("the Ray cluster did not take a job in 120 s")


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
        shutil.rmtree(folder, ignore_errors=True)


def finished(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("finished", 2)
    return summary


def test_the_literal_ray_job_submit_of_a_job_file_succeeds(cluster: Cluster) -> None:
    done = cluster.submit("jobs/quickstart.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert finished(cluster.repository / "runs" / "quickstart")["val_top1"] >= 0.97


@pytest.mark.slow
def test_a_submitted_working_directory_keeps_its_runs_in_the_home_folder(cluster: Cluster) -> None:
    done = cluster.submit("--working-dir", ".", "--", "jobs/quickstart.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "orchestrator-runs" in done.stdout + done.stderr
    assert finished(Path(cluster.environment["HOME"]) / "orchestrator-runs" / "quickstart")["val_top1"] >= 0.97


def test_a_failing_job_ends_with_our_message_and_our_exit_code(cluster: Cluster) -> None:
    job = ["jobs/quickstart.yaml", "--set", "data.train=nowhere", "--set", "name=failing"]
    failed = cluster.submit("--submission-id", "failing", "--", *job)
    assert failed.returncode != 0
    message = f"--set: data.train: {cluster.repository / 'nowhere'}: there is no such folder; "
    log = cluster.client.get_job_logs("failing")
    lines = [line for line in log.strip().splitlines() if "\tINFO " not in line]
    assert lines[-1].startswith(message), lines
    assert cluster.client.get_job_info("failing").driver_exit_code == 3


def _submit(cluster: Cluster, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "submit", "jobs/quickstart.yaml", *words],
        cwd=cluster.repository, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_our_submit_ends_with_the_drivers_exit_code_and_sends_no_secrets(cluster: Cluster) -> None:
    (cluster.repository / ".env").write_text("PASSWORD=word")
    failing = _submit(cluster, "--set", "data.train=nowhere", "--set", "name=submitted-failing")
    out, err = failing.communicate(timeout=200)
    assert failing.returncode == 3, out + err
    assert "nowhere: there is no such folder; " in out
    packages = list((Path(cluster.environment["HOME"]) / "ray").rglob("_ray_pkg_*/pyproject.toml"))
    assert packages, "the working directory arrived"
    assert not [p for package in packages for p in package.parent.rglob(".env")]


@pytest.mark.slow
def test_a_stop_of_a_job_that_we_submitted_saves_and_the_next_submission_goes_on(cluster: Cluster) -> None:
    words = ["name=submitted", "train.epochs=2000", "checkpoint.every_epochs=2000", "cluster.launcher=process",
             "cluster.workers=1", "cluster.stages=1"]  # fmt: skip
    words = [word for value in words for word in ("--set", value)]
    out, code = _stopped_at(cluster, _submit(cluster, *words), "epoch   2/")
    assert code == 75, out
    run = Path(cluster.environment["HOME"]) / "orchestrator-runs" / "submitted"
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["status"] == "interrupted"
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{outcome['step']:09d}"]
    out, code = _stopped_at(cluster, _submit(cluster, *words), "Attempt 2 goes on")
    assert f"Attempt 2 goes on from step {outcome['step']}." in out


def _stopped_at(cluster: Cluster, process: subprocess.Popen[str], sign: str) -> tuple[str, int]:
    """Everything that a submission said and its exit code; `ray job stop` came at the line that begins with `sign`."""
    assert process.stdout is not None
    said, submission = "", ""
    for line in process.stdout:
        said += line
        if line.startswith("Submitted "):
            submission = line.split()[1].rstrip(";")
        if line.startswith(sign):
            break
    stop = [str(BIN / "ray"), "job", "stop", "--address", cluster.url, submission]
    subprocess.run(stop, env=cluster.environment, capture_output=True, check=True, timeout=120)
    out, err = process.communicate(timeout=120)
    return said + out + err, process.returncode
