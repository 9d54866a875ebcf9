"""From the command to the first training step on a Ray that runs already: seconds, and where they go.

python -m benchmarks.start [--full]

Starts a Ray head of two CPUs on loopback with ports of its own, then runs jobs/quickstart.yaml, two workers, for a few
steps again and again. The seconds are those that the run itself tells (`first_step` in events.jsonl), counted from the
start of the process; the first run is not counted, since it finds files that are not in the page cache.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import publish, spread
from orchestrator.launch.local import _free_port

ROOT = Path(__file__).parent.parent
STEPS = 3
LIMIT_S = 12.0


@contextmanager
def warm_ray(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of runs on a Ray head of this machine, which is there before them; its token is its own."""
    port, log, token = _free_port(), folder / "ray.log", folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    words = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--port={port}",
        "--include-dashboard=false",
    ]
    words += ["--node-ip-address=127.0.0.1"]
    words += [f"--temp-dir={folder / 'ray'}", f"--ray-client-server-port={_free_port()}"]
    words += [f"--dashboard-agent-listen-port={_free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
    for _ in range(3):  # Ray gives itself 15 s, which a busy machine may not have
        with open(log, "wb") as out:
            head = subprocess.Popen(words, stdout=out, stderr=out, env=environment, start_new_session=True)
        while head.poll() is None and "runtime started" not in log.read_text():
            time.sleep(0.2)
        if head.poll() is None:
            break
    else:
        raise SystemExit(f"no Ray here: {log.read_text()}")
    try:
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def one_start(environment: dict[str, str], runs: Path, name: str) -> dict[str, float]:
    """The seconds of one run, by part. Raises CalledProcessError when it fails."""
    settings = [f"runs={runs}", f"name={name}", f"train={{steps: {STEPS}, global_batch_size: 50, lr: 1e-3}}"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "orchestrator", "run", "jobs/quickstart.yaml", *words]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = (runs / name / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    seconds: dict[str, float] = next(event for event in events if event["event"] == "first_step")["seconds"]
    return seconds


def main() -> None:
    count = 9 if "--full" in sys.argv[1:] else 3
    with tempfile.TemporaryDirectory(prefix="start-", dir="/tmp") as scratch, warm_ray(Path(scratch)) as there:
        runs = Path(scratch) / "runs"
        found = [one_start(there, runs, f"run-{i}") for i in range(count + 1)][1:]
    rows: list[dict[str, Any]] = [{"part": "all", "seconds": spread([sum(s.values()) for s in found])}]
    rows += [{"part": part, "seconds": spread([s[part] for s in found])} for part in found[0]]
    verdict = "met" if rows[0]["seconds"]["median"] < LIMIT_S else "not met"
    load = os.getloadavg()[0]
    publish(
        "start",
        f"python -m benchmarks.start{' --full' if count == 9 else ''}",
        "From the command to the first step on a warm local Ray, two workers, seconds",
        rows,
        [
            f"goal: less than {LIMIT_S:g} s: {verdict}; load of the machine at the end {load:.1f}",
            "job: interpreter, imports, job file, data, plan; workers: Ray Train's start, their imports, their group",
        ],
    )


if __name__ == "__main__":
    main()
