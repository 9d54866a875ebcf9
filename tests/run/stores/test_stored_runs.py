"""Runs in a bucket: another machine, which has nothing of them, goes on from the store alone with the same bits."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.stores.run_store import RunStore
from orchestrator.errors import Interrupted, OrchestratorError
from orchestrator.job import paths
from orchestrator.job.load import load_job
from orchestrator.launch.driver import run_job
from orchestrator.launch.workers.local import run_here
from orchestrator.run.context import LocalContext
from orchestrator.run.stores import mirror
from orchestrator.run.stores.attached import attached
from orchestrator.run.stores.lease import StoreLease
from orchestrator.run.worker import Assignment
from tests.conftest import Command, environment, started
from tests.runs import layer_files, summary_of
from tests.stores import BUCKET, Bucket, Door, Fault, wait_until

EVERY_5 = ("--set", "checkpoint.every_steps=5", "--set", "checkpoint.keep_last=2")


class Store:
    """A folder of runs in the bucket, and machines that have nothing but their own disks."""

    def __init__(self, bucket: Bucket, before: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bucket, self.before = bucket, before
        self.prefix, self._disks, self._monkeypatch = f"{tmp_path.name}/runs", tmp_path, monkeypatch
        self.url = f"s3://{BUCKET}/{self.prefix}"
        self.machine("first")

    def machine(self, name: str) -> None:
        """From here on, be on this machine."""
        self.disk = self._disks / name
        self._monkeypatch.setenv("XDG_CACHE_HOME", str(self.disk))

    def machine_of(self, path: Path) -> str:
        return path.relative_to(self._disks).parts[0]

    def run(self, name: str) -> Path:
        """The folder of a run on this machine."""
        return Path(paths.runs_here(self.url)) / name

    def files(self, name: str) -> list[str]:
        return self.bucket.names(f"{self.prefix}/{name}")

    def json(self, name: str) -> Any:
        return json.loads(self.bucket.get(f"{self.prefix}/{name}"))

    def steps(self, name: str) -> list[int]:
        return [int(f[17:26]) for f in self.files(name) if f.startswith("checkpoints/") and f.endswith("manifest.json")]


@pytest.fixture
def store(bucket: Bucket, before: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(bucket, before, tmp_path, monkeypatch)


@pytest.fixture
def call(store: Store, in_process: Command) -> Callable[..., str]:
    """A command that must end with this exit code; what it said. No secret is ever said."""

    def call(*arguments: str | Path, code: int = 0) -> str:
        done = in_process(*arguments)
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "AKIATEST" not in said and "secret" not in said
        return said

    return call


@pytest.fixture
def plain(tiny_job: Callable[..., Path], call: Callable[..., str], tmp_path: Path) -> Path:
    """The same job in a folder, undisturbed."""
    call("run", tiny_job("plain"), *EVERY_5)
    return tmp_path / "runs" / "plain"


def assert_same(store: Store, name: str, plain: Path) -> dict[str, Any]:
    ours, theirs = summary_of(store.run(name)), summary_of(plain)
    for key in ("weights_sha256", "order_sha256", "sample_keys_sha256", "val_top1"):
        assert ours[key] == theirs[key], key
    assert layer_files(store.run(name)) == layer_files(plain)
    return ours


def test_a_run_whose_store_died_goes_on_elsewhere_from_what_the_store_has(
    store: Store, tiny_job: Callable[..., Path], call: Callable[..., str], plain: Path
) -> None:
    job, flags = tiny_job("far"), ("--set", f"runs={store.url}", *EVERY_5)
    # The third save on nothing goes up any more: two are warnings, the next ends the run.
    store.before.faults.append(Fault(503, where="/checkpoints/step_00000001", times=3, method="PUT"))
    store.before.faults.append(Fault(403, where="/checkpoints/step_00000002", times=10**6, method="PUT"))
    store.before.faults.append(Fault(403, where="/checkpoints/step_00000003", times=10**6, method="PUT"))
    said = call("run", job, *flags, code=1)
    assert "could not be written" in said and "warning 1 of 2" in said
    assert "see that the store can be written" in said
    assert store.before.fired[503] == 3, "a few failures are nothing but tried again"
    last = store.steps("far")[-1]
    assert 0 < last < 20
    assert len(store.steps("far")) == 2, "the store keeps as many as keep_last says"
    store.before.faults.clear()
    store.machine("second")
    assert not store.run("far").exists()
    said = call("run", job, *flags)
    assert f"Attempt 2 goes on from step {last}." in said
    assert f"Run folder   {store.url}/far" in said
    summary = assert_same(store, "far", plain)
    assert summary["attempts"] == 2 and summary["attempt_steps"][1][0] == last
    assert store.json("far/summary.json") == summary
    assert store.steps("far")[-1] == summary["steps"]
    assert {"job.yaml", "events.jsonl", "progress.json", "attempts.json", "classes.json"} <= set(store.files("far"))
    assert store.url in store.bucket.get(f"{store.prefix}/far/job.yaml").decode()
    written = b"".join(store.bucket.get(f"{store.prefix}/far/{name}") for name in store.files("far"))
    assert b"AKIATEST" not in written


def test_a_finished_run_is_used_from_a_machine_that_has_nothing_of_it(
    store: Store, tiny_job: Callable[..., Path], call: Callable[..., str], tmp_path: Path
) -> None:
    job, flags = tiny_job("done"), ("--set", f"runs={store.url}")
    call("run", job, *flags)
    url, summary = f"{store.url}/done", store.json("done/summary.json")
    store.machine("second")
    call("run", job, *flags, "--summary", tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert f"is finished already ({url}/summary.json)" in call("run", job, *flags)
    assert json.loads(call("runs", "ls", store.url, "--json"))[0]["val_top1"] == summary["val_top1"]
    steps = json.loads(call("runs", "show", url, "--json"))["checkpoints"]
    assert steps == [{"step": step, "problems": []} for step in store.steps("done")]
    assert "all hashes are right" in call("runs", "verify", url)
    call("eval", url, "--json", tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["top1"] == pytest.approx(summary["val_top1"])
    call("report", url, "--out", tmp_path / "page.html")
    assert "val top-1" in (tmp_path / "page.html").read_text()
    assert "The jobs differ in nothing" in call("runs", "compare", url, url)
    # Another run starts from its weights, on a third machine.
    store.machine("third")
    call("run", tiny_job("next"), *flags, "--set", "train.init_from=done", "--set", "train.epochs=1")
    assert _first_loss(store, "next") < 0.5 * _first_loss(store, "done")
    # What is damaged is found by its hash, and a run that is deleted is gone.
    store.bucket.put(f"{store.prefix}/done/checkpoints/step_{summary['steps']:09d}/state.json", b"{}")
    assert "state.json has 2 bytes" in call("runs", "verify", url, code=4)
    call("runs", "rm", url, "--yes")
    assert store.files("done") == []
    assert "not a run" in call("runs", "show", url, code=4)


def _first_loss(store: Store, name: str) -> float:
    events = [json.loads(line) for line in store.bucket.get(f"{store.prefix}/{name}/events.jsonl").splitlines()]
    loss: float = next(event["train_loss"][-1] for event in events if event["event"] == "epoch")
    return loss


def test_a_run_begun_afresh_is_renamed_in_the_store_and_its_copies_elsewhere_are_old(
    store: Store, tiny_job: Callable[..., Path], call: Callable[..., str]
) -> None:
    job, flags = tiny_job("again"), ("--set", f"runs={store.url}")
    call("run", job, *flags)
    first = store.json("again/summary.json")
    store.machine("second")
    said = call("run", job, *flags, "--set", "train.seed=1", "--resume", "never")
    assert "The earlier run again is now again.replaced-" in said
    (old,) = [name for name in RunStore(store.url).folders() if name != "again"]
    assert store.json(f"{old}/summary.json") == first
    second = store.json("again/summary.json")
    assert second["weights_sha256"] != first["weights_sha256"]
    store.machine("first")
    call("eval", f"{store.url}/again")
    assert summary_of(store.run("again")) == second


def test_a_second_driver_elsewhere_is_refused(
    store: Store, tiny_job: Callable[..., Path], call: Callable[..., str]
) -> None:
    with StoreLease(RunStore(store.url), "held", lambda _: None, beat_s=0.2):
        said = call("run", tiny_job("held"), "--set", f"runs={store.url}", code=1)
    assert f"held: this run is already being driven by process {os.getpid()} on " in said
    assert store.files("held") == []


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        (Fault(403, where="lease", method="PUT", times=9), 2, "reading and writing is not allowed (403); set AWS_ACC"),
        (Fault(404, where="lease", method="PUT", times=9), 2, "there is no such file (404); create the bucket"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_before_anything_starts(
    store: Store, tiny_job: Callable[..., Path], call: Callable[..., str], fault: Fault, code: int, told: str
) -> None:
    store.before.faults.append(fault)
    said = call("run", tiny_job("refused"), "--set", f"runs={store.url}", code=code)
    assert told in said


def test_all_damaged_ends_with_exit_4(store: Store, tiny_job: Callable[..., Path], call: Callable[..., str]) -> None:
    job, flags = tiny_job("hurt"), ("--set", f"runs={store.url}", "--set", "train.epochs=1")
    call("run", job, *flags)
    for step in store.steps("hurt"):
        store.bucket.put(f"{store.prefix}/hurt/checkpoints/step_{step:09d}/layer_00.safetensors", b"x")
    store.bucket.delete(f"{store.prefix}/hurt/summary.json")
    store.machine("second")
    assert "layer_00.safetensors has 1 bytes" in call("run", job, *flags, code=4)


def test_another_machine_has_a_new_mlflow_run_with_all_metrics(
    store: Store, tiny_job: Callable[..., Path], call: Callable[..., str]
) -> None:
    job, flags = tiny_job("tracked"), ("--set", f"runs={store.url}")
    job.write_text(job.read_text().replace(job.read_text().splitlines()[-1], ""))
    call("run", job, *flags)
    store.bucket.delete(f"{store.prefix}/tracked/summary.json")  # as if it had been killed a moment before
    store.machine("second")
    call("run", job, *flags)
    with sqlite3.connect(store.run("tracked").parent / "mlflow.db") as database:
        (epochs,) = database.execute("select count(*) from metrics where key = 'train/loss'").fetchone()
    assert epochs == 2


@contextmanager
def machine(store: Store, name: str) -> Iterator[None]:
    """Be on another machine for a while."""
    before = store.disk.name
    store.machine(name)
    try:
        yield
    finally:
        store.machine(before)


def test_a_wish_to_stop_reaches_workers_that_do_not_see_the_drivers_disk(
    store: Store, tiny_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "PERIOD_S", 0.1)

    def far(assignment: Assignment) -> None:
        with machine(store, "node"):
            with attached(assignment, LocalContext()) as (placed, _):
                stop = Path(placed.run_dir) / "stop-1"
                assert store.machine_of(stop) == "node" and not stop.exists()
                wait_until(stop.exists)
            run_here(assignment, LocalContext())

    job = load_job(tiny_job("stopped"), [f"runs={store.url}", f"train.max_hours={1 / 3600}", "train.epochs=50"])
    with pytest.raises(Interrupted, match=r"stopped was stopped after step \d+ and saved"):
        run_job(job, say=lambda _: None, launch=far)
    assert store.json("stopped/outcome.json")["status"] == "interrupted"
    assert store.steps("stopped")[-1] < 50 * 14
    assert not [name for name in store.files("stopped") if name.startswith("stop-")], "the wish was granted"


def test_a_failure_of_workers_that_do_not_see_the_drivers_disk_is_told_with_its_cause(
    store: Store, tiny_job: Callable[..., Path]
) -> None:
    def far(assignment: Assignment) -> None:
        with machine(store, "node"):
            run_here(assignment, LocalContext())

    job = load_job(tiny_job("wild"), [f"runs={store.url}", "train.lr=1e30", "train.grad_clip=null"])
    with pytest.raises(OrchestratorError, match="its loss is not finite at step"):
        run_job(job, say=lambda _: None, launch=far)


def test_workers_that_do_not_see_the_drivers_disk_run_by_way_of_the_store(
    store: Store, tiny_job: Callable[..., Path], plain: Path
) -> None:
    """The launcher stands for another node: what it runs finds another cache, and nothing of the driver's in it."""

    def far(assignment: Assignment) -> None:
        with machine(store, "node"):
            assert not store.run("split").exists()
            run_here(assignment, LocalContext())

    job = load_job(tiny_job("split"), [f"runs={store.url}", *EVERY_5[1::2]])
    summary = run_job(job, say=lambda _: None, launch=far)
    assert summary["weights_sha256"] == summary_of(plain)["weights_sha256"]
    assert summary_of(store.run("split")) == summary == store.json("split/summary.json")
    events = [json.loads(line)["event"] for line in (store.run("split") / "events.jsonl").read_text().splitlines()]
    assert events.count("epoch") == 2 and events.count("plan") == 1
    assert layer_files(store.run("split")) == layer_files(plain)


def shell(store: Store, disk: str, **more: str) -> dict[str, str]:
    """The environment of a user's shell on another machine."""
    return environment() | {"XDG_CACHE_HOME": str(store.disk.parent / disk)} | more


def wait_for_upload(store: Store, name: str, process: subprocess.Popen[str]) -> None:
    def there() -> bool:
        assert process.poll() is None, process.communicate()
        return bool(store.steps(name))

    wait_until(there, 120)


@pytest.mark.slow
def test_a_run_killed_on_one_machine_ends_on_another_with_the_same_bits(
    store: Store, tiny_job: Callable[..., Path], call: Callable[..., str], tmp_path: Path
) -> None:
    long = ("--set", "train.epochs=20", "--set", "checkpoint.every_steps=10")
    job, flags = tiny_job("killed"), ("--set", f"runs={store.url}", *long)
    two = ("--set", "cluster.workers=2", "--set", "cluster.stages=2")
    with started("run", job, *flags, *two, env=shell(store, "first")) as driver:
        wait_for_upload(store, "killed", driver)
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate(timeout=60)
    store.machine("second")
    said = call("run", job, *flags)
    assert "Attempt 2 goes on from step" in said
    call("run", tiny_job("plain"), *long)
    summary = assert_same(store, "killed", tmp_path / "runs" / "plain")
    assert summary["attempt_steps"][1][0] > 0


@pytest.mark.slow
def test_two_machines_without_a_common_disk_save_their_own_layers_and_go_on(
    store: Store, tiny_job: Callable[..., Path], call: Callable[..., str], tmp_path: Path
) -> None:
    """Two ranks as torchrun starts them, each with a disk of its own; killed, and gone on with disks that are new."""
    long = ("--set", "train.epochs=12", "--set", "checkpoint.every_steps=10")
    job = tiny_job("apart")
    flags = ("--set", f"runs={store.url}", *long, "--set", "cluster.workers=2", "--set", "cluster.stages=2")
    for attempt in (1, 2):
        ranks = [
            shell(
                store,
                f"rank-{rank}-{attempt}",
                RANK=str(rank),
                LOCAL_RANK="0",
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(29_700 + os.getpid() % 1000 + attempt),
                GLOO_SOCKET_IFNAME="lo",
            )
            for rank in (0, 1)
        ]
        with started("run", job, *flags, env=ranks[0]) as lead, started("run", job, *flags, env=ranks[1]) as other:
            if attempt == 1:
                wait_for_upload(store, "apart", lead)
                for process in (lead, other):
                    os.kill(process.pid, signal.SIGKILL)
                continue
            out, err = lead.communicate(timeout=240)
            assert lead.returncode == 0, out + err
            assert "Attempt 2 goes on from step" in out
            out, err = other.communicate(timeout=60)
            assert other.returncode == 0, out + err
        time.sleep(1)
    call("run", tiny_job("plain"), *long)
    summary, plain = store.json("apart/summary.json"), summary_of(tmp_path / "runs" / "plain")
    for key in ("weights_sha256", "order_sha256", "sample_keys_sha256"):
        assert summary[key] == plain[key], key
    assert summary["attempts"] == 2 and summary["stages"] == 2
