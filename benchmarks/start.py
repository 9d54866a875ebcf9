"""From the command to the first training step on a Ray that runs already: seconds, and where they go.

python -m benchmarks.start [--full]

Starts a Ray head of two CPUs on loopback with ports of its own, then runs jobs/quickstart.yaml, two workers, for a few
steps again and again. The seconds are those that the run itself tells (`first_step` in events.jsonl), counted from the
start of the process; the first run is not counted, since it finds files that are not in the page cache.

Beside them the processor seconds of all processes until then, by kind: on two cores at least half of these pass. Then
what the processes of a run import, one after the other: seconds by package, those of at least 0.1 s.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.common import free_port, publish, spread

ROOT = Path(__file__).parent.parent
STEPS = 3
LIMIT_S = 12.0
# What each kind of process of a run imports before it can do its work.
IMPORTS = {
    "driver": "import orchestrator.launch.driver, ray, mlflow.tracking, ray.train.torch",
    "Ray Train's controller": "import ray._private.workers.setup_worker, ray.train.torch",
    "worker": "import ray.train.torch, orchestrator.run.worker",
}
WORTH_TELLING_S = 0.1


@contextmanager
def warm_ray(folder: Path) -> Iterator[tuple[dict[str, str], int]]:
    """The environment of runs on a Ray head of this machine, which is there before them, and the process of that head.

    Its token is its own.
    """
    port, log, token = free_port(), folder / "ray.log", folder / "token"
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
    words += [f"--temp-dir={folder / 'ray'}", f"--ray-client-server-port={free_port()}"]
    words += [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
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
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}, head.pid
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def processor_seconds(roots: Sequence[int]) -> dict[int, tuple[str, float]]:
    """Of these processes and everything below them: what each is, and the processor seconds that it has used."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            words = (stat.parent / "cmdline").read_bytes().decode().replace("\0", " ").split()
            used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            found[int(stat.parent.name)] = (int(fields[1]), _called(words), used)
    below: dict[int, tuple[str, float]] = {}
    ahead = [*roots]
    while ahead:
        pid = ahead.pop()
        if pid in found and pid not in below:
            below[pid] = found[pid][1:]
            ahead += [child for child, (parent, _, _) in found.items() if parent == pid]
    return below


def _called(words: Sequence[str]) -> str:
    name = " ".join(words)
    if name.startswith("ray::"):
        return "Ray: " + re.split(r"[.:(_ ]", name.removeprefix("ray::").lstrip("_"), maxsplit=1)[0]
    return "driver" if "orchestrator" in words else "Ray's own"


def one_start(environment: dict[str, str], runs: Path, name: str, head: int) -> tuple[dict[str, float], Counter[str]]:
    """The seconds of one run until its first step by part, and the processor seconds until then by kind of process.

    Raises CalledProcessError when the run fails.
    """
    settings = [f"runs={runs}", f"name={name}", f"train={{steps: {STEPS}, global_batch_size: 50, lr: 1e-3}}"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "orchestrator", "run", "jobs/quickstart.yaml", *words]
    before = processor_seconds([head])
    used: dict[int, tuple[str, float]] = {}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as driver:
        while driver.poll() is None:
            time.sleep(0.25)
            if not _first_step(runs / name):
                used |= processor_seconds([head, driver.pid])
    seconds = _first_step(runs / name)
    if driver.returncode != 0 or seconds is None:
        raise subprocess.CalledProcessError(driver.returncode, command)
    processors: Counter[str] = Counter()
    for pid, (what, so_far) in used.items():
        processors[what] += so_far - before.get(pid, ("", 0.0))[1]  # type: ignore[assignment]
    return seconds, processors


def _first_step(run: Path) -> dict[str, float] | None:
    """What a run tells of its start; None before its first step."""
    with suppress(OSError):
        for line in (run / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "first_step":
                seconds: dict[str, float] = event["seconds"]
                return seconds
    return None


def imports(statement: str) -> dict[str, float]:
    """Seconds of the imports of a fresh process by top-level package, the longest first; as `python -X importtime`
    counts them, which takes time itself."""
    command = [sys.executable, "-X", "importtime", "-c", statement]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr
    seconds: Counter[str] = Counter()
    for own_us, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)$", told, re.MULTILINE):
        seconds[name.partition(".")[0]] += int(own_us) / 1e6
    return dict(seconds.most_common())


def main() -> None:
    count = 9 if "--full" in sys.argv[1:] else 3
    with tempfile.TemporaryDirectory(prefix="start-", dir="/tmp") as scratch, warm_ray(Path(scratch)) as (there, head):
        runs = Path(scratch) / "runs"
        found = [one_start(there, runs, f"run-{i}", head) for i in range(count + 1)][1:]
    rows: list[dict[str, Any]] = [{"part": "all", "seconds": spread([sum(s.values()) for s, _ in found])}]
    rows += [{"part": part, "seconds": spread([s[part] for s, _ in found])} for part in found[0][0]]
    rows.append({"part": "processors, all", "seconds": spread([sum(used.values()) for _, used in found])})
    for what in sorted({what for _, used in found for what in used}):
        rows.append({"part": f"processors, {what}", "seconds": spread([float(used[what]) for _, used in found])})
    for process, statement in IMPORTS.items():
        packages = imports(statement)
        rows.append({"part": f"imports, {process}", "seconds": sum(packages.values())})
        told = {name: seconds for name, seconds in packages.items() if seconds >= WORTH_TELLING_S}
        rows += [{"part": f"imports, {process}: {name}", "seconds": seconds} for name, seconds in told.items()]
    verdict = "met" if rows[0]["seconds"]["median"] < LIMIT_S else "not met"
    load = os.getloadavg()[0]
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    compiled = os.path.exists(importlib.util.cache_from_source(torch.origin))
    publish(
        "start",
        f"python -m benchmarks.start{' --full' if count == 9 else ''}",
        "From the command to the first step on a warm local Ray, two workers, seconds",
        rows,
        [
            f"goal: less than {LIMIT_S:g} s: {verdict}; load of the machine at the end {load:.1f}",
            f"bytecode of the packages {'is' if compiled else 'is not'} there",
            "job: interpreter, imports, job file, data, plan; workers: Ray Train's start, their imports, their group",
        ],
    )


if __name__ == "__main__":
    main()
