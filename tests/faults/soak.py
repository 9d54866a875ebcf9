"""Random faults against a real run for some minutes, then the proof that nothing was lost. `make soak`

python -m tests.faults.soak [--minutes 10] [--folder FOLDER] [--seed 0]

A run of two workers and two stages, tracked by a real MLflow server, is hit by one fault after the other and started
again by the same command whenever it ended. When the time is over it may finish. Then the same job runs once more,
undisturbed, and the two must agree: weights, order of consumption and the samples of every epoch (I1, I2); no process
and no temporary file is left; every kind of fault was seen to happen (I3).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.conftest import ROOT, environment
from tests.processes import Descendants, free_port, workers
from tests.runs import summary_of

JOB = """\
kind: train
name: {name}
runs: {runs}
data: digits
model: {{arch: vgg, widths: [32, 64, 128], pool_after: [1], head_grid: 4}}
objective: {{name: hff}}
train: {{epochs: {epochs}, global_batch_size: 50, optimizer: adamw, lr: 4.0e-3, eval_every_epochs: 20}}
cluster: {{launcher: process, workers: 2, stages: 2, threads_per_worker: 1, timeout_s: 15, max_failures: 1000}}
checkpoint: {{every_steps: 100, keep_last: 4}}
tracking: {{uri: "{uri}"}}
"""
# Of the same values two runs must have.
SAME = ("weights_sha256", "order_sha256", "sample_keys_sha256", "samples_seen", "steps", "val_top1")
INTERRUPTED = 75


class Failed(Exception):
    """A promise was not kept."""


class Server:
    """An MLflow server on loopback that can be killed and started again on the same port and database."""

    def __init__(self, folder: Path, database: str | None = None) -> None:
        self.folder, self.port = folder, free_port()
        self.database = database or f"sqlite:///{folder}/mlflow.db"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        store = ["--workers", "1", "--backend-store-uri", self.database]
        store += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, *store], stdout=log, stderr=log, env=environment(), start_new_session=True
            )
        until = time.monotonic() + 180
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.5)
        raise Failed("the MLflow server did not start in 180 s")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Victim:
    """The run as it is now: its driver, its workers, its folder."""

    def __init__(self, job: Path, run: Path, log: Path) -> None:
        self.job, self.run, self._log = job, run, log
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        with open(self._log, "ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", "run", str(self.job)],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment(),
                start_new_session=True,
            )

    def ended(self) -> int | None:
        return self.driver.poll()

    def wait(self, expected: int, timeout_s: float = 120) -> None:
        code = self.driver.wait(timeout_s)
        if code != expected:
            raise Failed(f"the command ended with {code}, expected {expected}; see {self._log}")

    def workers(self) -> list[int]:
        return workers(self.driver.pid)

    def step(self) -> tuple[int, int]:
        """Attempt and step of the newest progress; (0, 0) before there is any."""
        try:
            progress = json.loads((self.run / "progress.json").read_text())
        except FileNotFoundError:
            return 0, 0
        return progress["attempt"], progress["step"]

    def newest(self) -> Path:
        return sorted((self.run / "checkpoints").glob("step_*"))[-1]


class Soak:
    """Injects faults; each returns what it did, or None when it could not."""

    def __init__(self, victim: Victim, server: Server, chance: random.Random) -> None:
        self.victim, self.server, self.chance = victim, server, chance
        self.injected: Counter[str] = Counter()
        self.faults: dict[str, Callable[[], None]] = {
            "worker killed": self.kill_worker,
            "driver killed": self.kill_driver,
            "driver told to stop": self.stop_driver,
            "worker told to stop": self.stop_worker,
            "worker hangs": self.hang_worker,
            "MLflow server killed": self.kill_server,
            "newest checkpoint rots": self.rot,
            "newest checkpoint cut": self.cut,
        }

    def kill_worker(self) -> None:
        os.kill(self.chance.choice(self.victim.workers()), signal.SIGKILL)

    def kill_driver(self) -> None:
        workers = self.victim.workers()
        os.kill(self.victim.driver.pid, signal.SIGKILL)
        self.victim.wait(-signal.SIGKILL)
        time.sleep(1)
        self.victim.start()
        until = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            if time.monotonic() > until:
                raise Failed(f"workers {workers} outlived their driver by 60 s")
            time.sleep(0.2)

    def stop_driver(self) -> None:
        os.kill(self.victim.driver.pid, signal.SIGTERM)
        self.victim.wait(INTERRUPTED)
        self.victim.start()

    def stop_worker(self) -> None:
        os.kill(self.chance.choice(self.victim.workers()), signal.SIGTERM)
        self.victim.wait(INTERRUPTED)
        self.victim.start()

    def hang_worker(self) -> None:
        os.kill(self.chance.choice(self.victim.workers()), signal.SIGSTOP)

    def kill_server(self) -> None:
        self.server.kill()
        time.sleep(3)
        self.server.start()

    def rot(self) -> None:
        self._damage(lambda data: bytes([data[0]]) + bytes(byte ^ 64 for byte in data[1:2]) + data[2:])

    def cut(self) -> None:
        self._damage(lambda data: data[: len(data) // 2])

    def _damage(self, change: Callable[[bytes], bytes]) -> None:
        """The driver dies, and the newest checkpoint, which it would go on from, is another one afterwards."""
        os.kill(self.victim.driver.pid, signal.SIGKILL)
        self.victim.wait(-signal.SIGKILL)
        time.sleep(2)  # the workers notice within half a second, and write nothing afterwards
        file = self.chance.choice(sorted(self.victim.newest().glob("layer_*.safetensors")))
        file.write_bytes(change(file.read_bytes()))
        self.victim.start()

    def go_on_until(self, deadline: float) -> None:
        """One fault after the other, each once the run has gone on by itself since the last one."""
        kinds: list[str] = []
        while time.monotonic() < deadline:
            if not self._trains(deadline):
                return
            if not kinds:
                kinds = sorted(self.faults)
                self.chance.shuffle(kinds)
            kind = kinds.pop()
            attempt, step = self.victim.step()
            print(f"{time.strftime('%H:%M:%S')}  attempt {attempt} step {step}: {kind}", flush=True)
            self.faults[kind]()
            self.injected[kind] += 1

    def _trains(self, deadline: float) -> bool:
        """Wait until the run makes steps in an attempt with two workers. False when the time is over first."""
        seen = self.victim.step()
        since = time.monotonic()
        while time.monotonic() < deadline:
            code = self.victim.ended()
            if code is not None:
                raise Failed(f"the run ended by itself with {code}: it was too short for so many minutes, or it failed")
            now = self.victim.step()
            if now[0] == seen[0] and now[1] >= seen[1] + 30 and len(self.victim.workers()) == 2:
                return True
            if now[0] != seen[0]:
                seen = now
            if time.monotonic() - since > 180:
                raise Failed(f"no step in 180 s (attempt {now[0]}, step {now[1]})")
            time.sleep(0.1)
        return False


def temporary_files(run: Path) -> list[str]:
    return [str(path.relative_to(run)) for path in run.rglob("*") if path.name.endswith(".tmp")]


def soak(folder: Path, minutes: float, epochs: int, seed: int) -> dict[str, object]:
    """Run everything; returns the report. Raises Failed."""
    runs = folder / "runs"
    server = Server(folder)
    job, plain = folder / "soak.yaml", folder / "undisturbed.yaml"
    job.write_text(JOB.format(name="soak", runs=runs, epochs=epochs, uri=server.uri))
    plain.write_text(JOB.format(name="undisturbed", runs=runs, epochs=epochs, uri=server.uri))
    chance = random.Random(seed)
    with ExitStack() as cleanup:
        watched = cleanup.enter_context(Descendants(os.getpid()))
        cleanup.callback(server.kill)
        server.start()
        victim = Victim(job, runs / "soak", folder / "soak.log")
        cleanup.callback(lambda: victim.driver.kill())
        attack = Soak(victim, server, chance)
        attack.go_on_until(time.monotonic() + 60 * minutes)
        print(f"{sum(attack.injected.values())} faults of {len(attack.injected)} kinds; now it may finish", flush=True)
        victim.wait(0, timeout_s=1800)
        steady = Victim(plain, runs / "undisturbed", folder / "undisturbed.log")
        cleanup.callback(lambda: steady.driver.kill())
        steady.wait(0, timeout_s=1800)
        server.kill()
        left = watched.left(within_s=60)
    disturbed, undisturbed = summary_of(runs / "soak"), summary_of(runs / "undisturbed")
    report = {
        "minutes": minutes,
        "faults": dict(attack.injected),
        "starts of the command": victim.starts,
        "attempts": disturbed["attempts"],
        "differences": [key for key in SAME if disturbed[key] != undisturbed[key]],
        "processes left": left,
        "temporary files left": temporary_files(runs / "soak"),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--epochs", type=int, default=400, help="long enough to outlast the faults")
    parser.add_argument("--folder", type=Path, help="default: a new temporary one; it is kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        report = soak(folder, arguments.minutes, arguments.epochs, arguments.seed)
    except Failed as error:
        print(f"FAILED: {error}\nEverything is in {folder}")
        return 1
    print(json.dumps(report, indent=1))
    broken = [key for key in ("differences", "processes left", "temporary files left") if report[key]]
    print(f"{'FAILED: ' + ', '.join(broken) if broken else 'Nothing was lost.'} Everything is in {folder}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
