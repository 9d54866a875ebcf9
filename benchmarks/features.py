"""Cached features: an epoch from the cache against the first pass, through the frozen backbone.

    python -m benchmarks.features [--full]

Each repetition is one `orchestrator run` of a frozen transfer job with an empty cache, and one of the same job
without a cache. The first pass is what its `features` event says (images read, decoded, sent through the backbone,
written); the second epoch is timed between the ends of the first and the second, with the training of all heads and
the save at its end; both are rates of the same run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import publish, spread

JOB = """\
kind: transfer
name: features
runs: {runs}
data: {{train: digits, val: {{from_train: 0.25}}, image_size: {size}}}
model: {{backbone: {backbone}, pretrained: false, head_grid: 2}}
objective: {{name: hff}}
train: {{epochs: 2, global_batch_size: 100, optimizer: adamw, lr: 1e-3, eval_every_epochs: 1000}}
cluster: {{launcher: process, workers: 1, stages: 1, threads_per_worker: 1}}
"""
SHORT, FULL = (("resnet18", 96),), (("resnet18", 96), ("resnet50", 128), ("vit_tiny_patch16_224", 224))


def run(job: Path, runs: Path, *settings: str) -> list[dict[str, Any]]:
    """The events of one run, started afresh."""
    flags = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "orchestrator", "run", str(job), "--resume", "never", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = (runs / "features" / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def second_epoch(events: list[dict[str, Any]]) -> float:
    """images/s between the ends of the first and the second epoch."""
    samples = next(e["samples_per_epoch"] for e in events if e["event"] == "start")
    first, second = (e["wall_seconds"] for e in events if e["event"] == "epoch")
    rate: float = samples / (second - first)
    return rate


def row(folder: Path, backbone: str, size: int, repetitions: int) -> dict[str, Any]:
    """One backbone: rates of both passes of the same runs, and their ratios."""
    job, runs = folder / "features.yaml", folder / "runs"
    job.write_text(JOB.format(runs=runs, backbone=backbone, size=size))
    passes, later, against_pass, against_images = [], [], [], []
    numbers = 0
    for _ in range(repetitions):
        shutil.rmtree(runs / ".features", ignore_errors=True)
        cached = run(job, runs)
        streamed = run(job, runs, "features.cache=false")
        made = next(e for e in cached if e["event"] == "features")
        numbers = made["numbers"]
        passes.append(made["images_per_second"])
        later.append(second_epoch(cached))
        against_pass.append(later[-1] / passes[-1])
        against_images.append(later[-1] / second_epoch(streamed))
    return {
        "backbone": f"{backbone}, {size} px, {numbers} numbers an image",
        "first pass, images/s": spread(passes),
        "second epoch, images/s": spread(later),
        "ratio": spread(against_pass),
        "against an epoch without a cache": spread(against_images),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three backbones instead of one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row(Path(scratch), name, size, 5) for name, size in (FULL if arguments.full else SHORT)]
    command = "python -m benchmarks.features" + (" --full" if arguments.full else "")
    notes = ["1797 digits as colour images, one process, one thread; heads at all stages train on the features"]
    publish("features", command, "Features of a frozen backbone, kept on disk", rows, notes)


if __name__ == "__main__":
    main()
