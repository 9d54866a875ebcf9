"""Cached features: an epoch from the cache against the first pass, through the frozen backbone.

    python -m benchmarks.features [--full]

Each repetition is one run of a frozen transfer job with an empty cache and, with --full, one of the same job without
a cache. The first pass is what its `features` event says (images read, decoded, sent through the backbone, written);
the second epoch is timed between the ends of the first and the second, with the training of all heads and the save
at its end. Both are rates of the same run, in one process with one thread.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks.common import publish, spread

JOB = """\
kind: transfer
name: {name}
runs: {runs}
data: {{train: digits, val: {{from_train: 0.25}}, image_size: {size}}}
model: {{backbone: {backbone}, pretrained: false, head_grid: 2}}
objective: {{name: hff}}
train: {{epochs: 2, global_batch_size: 100, optimizer: adamw, lr: 1e-3, eval_every_epochs: 1000}}
cluster: {{launcher: process, workers: 1, stages: 1, threads_per_worker: 1}}
"""
_REPETITIONS = 5
SHORT, FULL = (("resnet18", 96),), (("resnet18", 96), ("resnet50", 128), ("vit_tiny_patch16_224", 224))


def run(folder: Path, name: str, backbone: str, size: int, *settings: str) -> list[dict[str, Any]]:
    """The events of one run."""
    from orchestrator.job.load import load_job
    from orchestrator.launch.driver import run_job
    from orchestrator.run.folder import RunFolder

    path = folder / f"{name}.yaml"
    path.write_text(JOB.format(name=name, runs=folder / "runs", backbone=backbone, size=size))
    run_job(load_job(path, settings), say=lambda _: None)
    events, _ = RunFolder(folder / "runs" / name).read_events()
    return events


def second_epoch(events: list[dict[str, Any]]) -> float:
    """images/s between the ends of the first and the second epoch."""
    samples = next(e["samples_per_epoch"] for e in events if e["event"] == "start")
    first, second = (e["wall_seconds"] for e in events if e["event"] == "epoch")
    rate: float = samples / (second - first)
    return rate


def row(folder: Path, backbone: str, size: int, *, against_images: bool) -> dict[str, Any]:
    """One backbone: rates of both passes of the same runs, and their ratios."""
    passes, later, ratios, streamed = [], [], [], []
    numbers = 0
    for i in range(_REPETITIONS):
        shutil.rmtree(folder / "runs" / ".features", ignore_errors=True)
        cached = run(folder, f"{backbone}-{i}", backbone, size)
        made = next(e for e in cached if e["event"] == "features")
        numbers = made["numbers"]
        passes.append(made["images_per_second"])
        later.append(second_epoch(cached))
        ratios.append(later[-1] / passes[-1])
        if against_images:
            images = run(folder, f"{backbone}-{i}-images", backbone, size, "features.cache=false")
            streamed.append(later[-1] / second_epoch(images))
    return {
        "backbone": f"{backbone}, {size} px, {numbers} numbers an image",
        "first pass, images/s": spread(passes),
        "second epoch, images/s": spread(later),
        "ratio": spread(ratios),
        "against an epoch without a cache": spread(streamed) if streamed else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three backbones instead of one")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # MLflow and its database layer warn of their own affairs
    with tempfile.TemporaryDirectory() as scratch:
        rows = [
            row(Path(scratch), name, size, against_images=arguments.full)
            for name, size in (FULL if arguments.full else SHORT)
        ]
    command = "python -m benchmarks.features" + (" --full" if arguments.full else "")
    notes = ["1797 digits as colour images, one process, one thread; heads at all stages train on the features"]
    publish("features", command, "Features of a frozen backbone, kept on disk", rows, notes)


if __name__ == "__main__":
    main()
