"""A cluster of four Ray nodes on this machine, from a client's point of view. `make rehearsal`

python -m tests.rehearsal [--folder FOLDER] [--database postgresql+psycopg2://... | --sqlite]

A Ray head without CPUs and three nodes of one CPU each (raylets of their own), shards on an S3 server, a real MLflow
server on PostgreSQL, all on loopback. `orchestrator submit` sends a job of two workers and follows it; the node of one
of them is killed; the run goes on with the nodes that are left; `ray job stop` ends it with exit code 75; the same
submission again finishes it. Then the same job runs in one process on a local folder, and both must agree: weights,
order, samples of every epoch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from orchestrator.data.packing.pack import pack
from tests.conftest import ROOT, environment
from tests.faults.soak import Failed, Server
from tests.postgres import Postgres
from tests.processes import Descendants, _table, free_port
from tests.runs import summary_of
from tests.stores import BUCKET, Bucket

BIN = Path(sys.executable).parent
NODES = 3
TRIES = 8
SAME = ("weights_sha256", "order_sha256", "sample_keys_sha256", "steps", "val_top1")
COMMON = (
    "train.epochs=80", "train.eval_every_epochs=4", "checkpoint.every_epochs=2", "cluster.timeout_s=20",
    "data.cache.max_bytes=100000000",
)  # fmt: skip
# Steps of an attempt before it is disturbed: of 2160 in all.
SOME_STEPS = 150


class Clock:
    """Says what has been done, and how long each part took."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()
        self.parts: dict[str, float] = {}

    def done(self, part: str, more: str = "") -> None:
        now = time.monotonic()
        self.parts[part] = round(now - self.last, 1)
        print(f"{now - self.began:5.0f} s  {part} ({now - self.last:.0f} s){more}", flush=True)
        self.last = now


def until(what: str, ready: Callable[[], Any], timeout_s: float = 180) -> Any:
    """Wait for something and return it. Raises Failed."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = ready()
        if found:
            return found
        time.sleep(0.5)
    raise Failed(f"{what}: not in {timeout_s:g} s")


class Nodes:
    """`ray start` for a head and nodes, each in a session of its own, stopped by its process group."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder, self.port, dashboard = folder, free_port(), free_port()
        self.url = f"http://127.0.0.1:{dashboard}"
        self.environment = {**environment(), "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder), **variables}
        self.running: list[subprocess.Popen[bytes]] = []
        head = ["--head", "--num-cpus=0", f"--port={self.port}", f"--dashboard-port={dashboard}"]
        head += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={folder / 'ray'}"]
        self._start([*head, f"--ray-client-server-port={free_port()}"])
        until("the head takes jobs", self._takes_jobs, 300)
        for _ in range(NODES):
            self._start([f"--address=127.0.0.1:{self.port}", "--num-cpus=1"])

    def _start(self, words: list[str]) -> None:
        """Start one node after the one before. Ray gives itself 15 s, so on a busy machine it may take some tries."""
        log = self.folder / f"node-{len(self.running)}.log"
        for _ in range(TRIES):
            node = self._tried(words, log)
            if node is not None:
                self.running.append(node)
                return
        raise Failed(f"a Ray node did not start in {TRIES} tries; see {log}")

    def _tried(self, words: list[str], log: Path) -> subprocess.Popen[bytes] | None:
        agent = [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
        with open(log, "wb") as out:
            node = subprocess.Popen(
                [str(BIN / "ray"), "start", "--block", *words, *agent],
                cwd=self.folder / "repository",
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        until("a node starts or gives up", lambda: node.poll() is not None or "runtime started" in log.read_text())
        if node.poll() is None:
            return node
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        return None

    def _takes_jobs(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/jobs/", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def with_a_worker(self) -> subprocess.Popen[bytes] | None:
        """A node, not the head, that has a worker of the run."""
        table = _table()

        def above(pid: int) -> set[int]:
            found = set()
            while pid in table and pid not in found:
                found.add(pid)
                pid = table[pid][0]
            return found

        workers = [pid for pid, (_, _, name) in table.items() if name.startswith("ray::RayTrainWorker")]
        return next((node for node in self.running[1:] for pid in workers if node.pid in above(pid)), None)

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def stop(self) -> None:
        for node in reversed(self.running):
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGTERM)
        for node in self.running:
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                self.kill(node)


class Client:
    """`orchestrator submit` of one job, its log in a file."""

    def __init__(self, nodes: Nodes, overrides: list[str], log: Path) -> None:
        self.nodes, self.log = nodes, log
        words = [word for override in overrides for word in ("--set", override)]
        command = [sys.executable, "-m", "orchestrator", "submit", "jobs/quickstart.yaml", "--address", nodes.url]
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [*command, *words], cwd=nodes.folder / "repository", env=nodes.environment, stdout=out, stderr=out
            )

    def says(self, words: str) -> bool:
        if self.process.poll() not in (None, 0):
            raise Failed(f"the submission ended with {self.process.returncode}; see {self.log}")
        return words in self.log.read_text()

    def stop(self) -> None:
        submission = self.log.read_text().split("Submitted ")[1].split(";")[0]
        command = [str(BIN / "ray"), "job", "stop", "--address", self.nodes.url, submission]
        subprocess.run(command, env=self.nodes.environment, capture_output=True, check=True, timeout=120)

    def ends_with(self, code: int, timeout_s: float = 400) -> None:
        if self.process.wait(timeout_s) != code:
            raise Failed(f"the submission ended with {self.process.returncode}, expected {code}; see {self.log}")


def step_of(run: Path) -> tuple[int, int]:
    """Attempt and step of the newest progress; (0, 0) before there is any."""
    try:
        progress = json.loads((run / "progress.json").read_text())
    except FileNotFoundError:
        return 0, 0
    return progress["attempt"], progress["step"]


def repository(folder: Path) -> None:
    """What a user has: the project without its data and runs."""
    for name in ("hff", "orchestrator", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def disturbed(nodes: Nodes, overrides: list[str], run: Path, clock: Clock) -> None:
    """Submit, kill a node, stop, submit again until it is finished. Raises Failed."""
    client = Client(nodes, overrides, nodes.folder / "first.log")
    until("the run makes steps", lambda: client.says("") and step_of(run)[1] > 0, 300)
    clock.done("submitted, first steps made")
    until("an epoch is followed", lambda: client.says("epoch   1/") and step_of(run)[1] > SOME_STEPS)
    node = until("a node with a worker", nodes.with_a_worker, 20)
    clock.done("trained", f": attempt {step_of(run)[0]} at step {step_of(run)[1]}; a node with a worker is killed")
    nodes.kill(node)
    until("the run goes on", lambda: client.says("") and step_of(run)[0] == 2 and step_of(run)[1] > 0, 300)
    at = step_of(run)[1]
    clock.done("the run went on by itself on the nodes that are left", f": step {at}")
    until("it makes steps again", lambda: step_of(run)[1] > at + SOME_STEPS)
    clock.done("trained again", f": attempt 2 at step {step_of(run)[1]}; ray job stop")
    client.stop()
    client.ends_with(75)
    clock.done("saved and ended with exit code 75")
    client = Client(nodes, overrides, nodes.folder / "second.log")
    until("the run goes on", lambda: client.says("") and step_of(run)[0] == 3, 300)
    clock.done("the same submission again, first steps made")
    client.ends_with(0)
    clock.done("finished")


def rehearse(folder: Path, database: str | None, *, sqlite: bool) -> dict[str, Any]:
    """Everything; returns the report. Raises Failed."""
    clock = Clock()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # each request to the bucket
    repository(folder / "repository")
    pack("digits", folder / "digits", shard_bytes=100_000)
    with ExitStack() as cleanup:
        watched = cleanup.enter_context(Descendants(os.getpid()))
        postgres = None if sqlite or database else Postgres()
        if postgres is not None:
            cleanup.callback(postgres.stop)
            database = postgres.uri
            clock.done(f"PostgreSQL {postgres.value('show server_version')} answers")
        bucket = Bucket()
        cleanup.callback(bucket.close)
        bucket.upload(folder / "digits", "digits")
        clock.done("shards are in the bucket")
        server = Server(folder, database)
        cleanup.callback(server.kill)
        server.start()
        clock.done("MLflow's server answers")
        store = {"AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        nodes = Nodes(folder, {**store, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{bucket.port}"})
        cleanup.callback(nodes.stop)
        clock.done(f"a Ray head and {NODES} nodes")
        data = f"data={{train: 's3://{BUCKET}/digits', val: {{from_train: 0.25}}, image_size: 8, channels: 1}}"
        overrides = [data, f"runs={folder / 'runs'}", "name=rehearsal", f"tracking.uri={server.uri}", *COMMON]
        disturbed(nodes, overrides, folder / "runs" / "rehearsal", clock)
        nodes.stop()
        clock.done("the cluster is stopped")
        alone(folder)
        clock.done("the same in one process, from the folder")
        status = _status(server.uri, summary_of(folder / "runs" / "rehearsal")["run_id"])
        rows = None if postgres is None else postgres.value("select count(*) from metrics")
        server.kill()
        if postgres is not None:
            postgres.stop()
        left = watched.left(within_s=60)
        clock.done("looked for what is left")
    far, near = summary_of(folder / "runs" / "rehearsal"), summary_of(folder / "runs" / "alone")
    return {
        "minutes": round((time.monotonic() - clock.began) / 60, 1),
        "seconds": clock.parts,
        "attempt_steps": far["attempt_steps"],
        "differences": [key for key in SAME if far[key] != near[key]],
        "MLflow's status": status,
        "metrics in PostgreSQL": rows,
        "processes left": left,
    }


def alone(folder: Path) -> None:
    """The undisturbed run."""
    data = f"data={{train: '{folder / 'digits'}', val: {{from_train: 0.25}}, image_size: 8, channels: 1}}"
    here = ["cluster.launcher=process", "cluster.workers=1", "cluster.stages=1"]
    overrides = [data, f"runs={folder / 'runs'}", "name=alone", *COMMON, *here]
    words = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "orchestrator", "run", "jobs/quickstart.yaml", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"the run in one process: {done.stderr}")


def _status(uri: str, run_id: str) -> str:
    import mlflow

    return str(mlflow.MlflowClient(uri).get_run(run_id).info.status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="default: a new temporary one, with a short path; it is kept")
    parser.add_argument(
        "--database", help="MLflow's, postgresql+psycopg2://USER:PASSWORD@HOST/NAME; default: one of its own"
    )
    parser.add_argument("--sqlite", action="store_true", help="MLflow's database without PostgreSQL")
    arguments = parser.parse_args()
    # Ray's sockets lie below its folder, and a socket's path is limited to 107 bytes.
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="rehearsal-", dir="/tmp"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        report = rehearse(folder, arguments.database, sqlite=arguments.sqlite)
    except Failed as error:
        print(f"FAILED: {error}\nEverything is in {folder}")
        return 1
    print(json.dumps(report, indent=1))
    good = not report["differences"] and not report["processes left"] and report["MLflow's status"] == "FINISHED"
    good = good and len(report["attempt_steps"]) == 3 and report["metrics in PostgreSQL"] != 0
    print(f"{'The rehearsal went well.' if good else 'FAILED.'} Everything is in {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
