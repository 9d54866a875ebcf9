"""What a black hole costs: a run whose MLflow server stops answering after its start, against one that tracks nothing.

    python -m benchmarks.tracking [--full]

A real MLflow server is stopped (SIGSTOP: connections are made, nothing is answered) once the run has ended its first
epoch, and goes on when the run has ended. Both sides take turns; a rate is that of the training loop after the first
epoch. Then `orchestrator runs replay` must bring every metric of every epoch to the server. The loop's own calls, one
line of events.jsonl an epoch, are timed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import interval, publish, spread
from orchestrator.run.folder import RunFolder
from orchestrator.run.records import tracking
from tests.faults.soak import Server

JOB = """\
kind: train
name: {name}
runs: {runs}
data: digits
model: {{arch: vgg, widths: [128, 256, 256], head_grid: 4}}
objective: {{name: hff}}
train: {{epochs: {epochs}, global_batch_size: 100, optimizer: adamw, lr: 1e-3, eval_every_epochs: 1000}}
cluster: {{launcher: process, workers: 1, stages: 1, threads_per_worker: 1}}
tracking: {{uri: "{uri}"}}
"""


def epochs_of(run: Path) -> list[dict[str, Any]]:
    return [event for event in RunFolder(run).read_events()[0] if event["event"] == "epoch"]


def rate(run: Path) -> float:
    """Epochs per second of the training loop after the first epoch."""
    epochs = epochs_of(run)
    return (len(epochs) - 1) / (epochs[-1]["wall_seconds"] - epochs[0]["wall_seconds"])


@contextmanager
def running(job: Path, *, tracked: bool) -> Iterator[subprocess.Popen[bytes]]:
    """The command, from its start to its end."""
    module = ["-m", "orchestrator", "run"] if tracked else ["-m", "benchmarks.tracking", "--untracked"]
    with subprocess.Popen([sys.executable, *module, str(job)], stdout=subprocess.DEVNULL) as process:
        yield process
    if process.returncode:
        raise SystemExit(f"{job} ended with {process.returncode}")


def untracked(job: Path) -> int:
    """`orchestrator run` without the thread that sends; no job can ask for that."""
    from orchestrator.cli import main as cli

    tracking.EventSink.start = lambda self: None  # type: ignore[method-assign]
    tracking.EventSink.stop = lambda self: None  # type: ignore[method-assign]
    return cli(["run", str(job)])


def into_the_hole(job: Path, run: Path, server: Server) -> None:
    """Train while the server is stopped."""
    assert server.process is not None
    with running(job, tracked=True) as process:
        while process.poll() is None and not epochs_of(run):
            time.sleep(0.05)
        os.killpg(server.process.pid, signal.SIGSTOP)
        try:
            process.wait()
        finally:
            os.killpg(server.process.pid, signal.SIGCONT)


def replayed(run: Path, uri: str) -> tuple[int, int]:
    """Metrics that the server has after a replay, and those that the run's events have."""
    subprocess.run([sys.executable, "-m", "orchestrator", "runs", "replay", str(run)], check=True, stdout=sys.stderr)
    expected = {
        (name, event["step"], value)
        for event in RunFolder(run).read_events()[0]
        for name, value in tracking.epoch_metrics(event).items()
    }
    (run_id,) = {attempt["run_id"] for attempt in json.loads((run / "attempts.json").read_text())}
    with tracking.client_of(uri) as client:
        names = {name for name, _, _ in expected}
        found = {(name, m.step, m.value) for name in names for m in client.get_metric_history(run_id, name)}
    return len(found & expected), len(expected)


def seconds_of_a_line(run: Path, scratch: Path) -> float:
    """Median seconds that the loop needs to hand on an epoch."""
    folder, event, seconds = RunFolder(scratch), epochs_of(run)[-1], []
    for _ in range(200):
        began = time.perf_counter()
        folder.append_event(event)
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def measured(scratch: Path, server: Server, pairs: int, epochs: int) -> dict[str, Any]:
    ratios, shares, arrived, sent = [], [], 0, 0
    for pair in range(pairs):
        runs: dict[str, Path] = {}
        for side in ("hole", "none") if pair % 2 else ("none", "hole"):
            name = f"{side}-{pair}"
            job, runs[side] = scratch / f"{name}.yaml", scratch / "runs" / name
            job.write_text(JOB.format(name=name, runs=scratch / "runs", epochs=epochs, uri=server.uri))
            if side == "hole":
                into_the_hole(job, runs[side], server)
            else:
                with running(job, tracked=False):
                    pass
        ratios.append(rate(runs["hole"]) / rate(runs["none"]))
        shares.append(seconds_of_a_line(runs["hole"], scratch) * rate(runs["hole"]))
        there, all_of_them = replayed(runs["hole"], server.uri)
        arrived, sent = arrived + there, sent + all_of_them
        print(f"{pair + 1} of {pairs}: {ratios[-1]:.3f}, {there} of {all_of_them} metrics", flush=True)
    return {
        "what": "MLflow as a black hole against no tracking",
        "images/s ratio": interval(ratios),
        "share of the loop in tracking calls, %": spread([100 * share for share in shares]),
        "metrics after replay": f"{arrived} of {sent}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="nine longer pairs instead of three")
    parser.add_argument("--untracked", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.untracked:
        raise SystemExit(untracked(arguments.untracked))
    pairs, epochs = (9, 30) if arguments.full else (3, 8)
    with tempfile.TemporaryDirectory() as scratch:
        server = Server(Path(scratch))
        server.start()
        try:
            row = measured(Path(scratch), server, pairs, epochs)
        finally:
            server.kill()
    command = "python -m benchmarks.tracking" + (" --full" if arguments.full else "")
    publish("tracking", command, "MLflow that never answers, one stage, one thread", [row], [])


if __name__ == "__main__":
    main()
