"""Orchestration tax: the same single-stage job through `orchestrator run` and as a bare loop.

    python -m benchmarks.tax [--full]

Both train the same layers on the same digits with one thread, on images that are decoded already: the bare loop has its
batches in memory before its clock starts; of the job the first epoch, in which it decodes, does not count. From then on
it makes its batches ahead in a loader thread, saves, reports and tracks under Ray. They take turns, each
job between two bare loops, whose mean it is compared with; its time is that of the training loop, with saves, without
start-up and evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

from benchmarks.common import publish, spread

JOB = """\
kind: train
name: tax
runs: {runs}
data: digits
model: {{arch: vgg, widths: [128, 256, 256], head_grid: 4}}
objective: {{name: hff}}
train: {{epochs: {epochs}, global_batch_size: 100, optimizer: adamw, lr: 1e-3, eval_every_epochs: 1000}}
cluster: {{workers: 1, stages: 1, threads_per_worker: 1}}
checkpoint: {{every_epochs: 5}}
"""


def orchestrated(job: Path) -> float:
    """images/s of the whole tool from its second epoch to its end."""
    command = [sys.executable, "-m", "orchestrator", "run", str(job), "--resume", "never"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (job.parent / "runs" / "tax" / "events.jsonl").read_text().splitlines()
    epochs = [event for event in map(json.loads, lines) if event["event"] == "epoch"]
    return (len(epochs) - 1) * 1347 / (epochs[-1]["wall_seconds"] - epochs[0]["wall_seconds"])


def bare(job: Path) -> float:
    """images/s of a plain loop, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.tax", "--bare", str(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def bare_loop(job_path: Path) -> None:
    import torch

    from hff.local import local_forward_backward, local_update, make_optimizer
    from orchestrator.job.load import load_job
    from orchestrator.job.resolved import job_to_dict
    from orchestrator.run import network
    from orchestrator.run.datasets import Normalise, open_datasets, prepare_embedded, train_stream
    from orchestrator.run.device import prepare_torch

    job = job_to_dict(load_job(job_path))
    prepare_torch(job["cluster"], torch.device("cpu"))  # what makes its steps fast counts for both sides
    runs = Path(job["runs"])
    prepare_embedded(job["data"], runs)
    datasets = open_datasets(job)
    layers = network.build(
        job["model"], job["objective"], input_shape=(1, 8, 8), num_classes=len(datasets.classes), seed=0
    )
    optimizers = [make_optimizer(layer.to(memory_format=torch.channels_last), "adamw", lr=1e-3) for layer in layers]
    stream = train_stream(datasets, job, replica=0, replicas=1)
    normalise = Normalise(job["data"], torch.device("cpu"), torch.float32)
    batches = [(normalise(b.images), b.labels) for b in stream.epoch(0)]
    began = time.perf_counter()
    for _ in range(job["train"]["epochs"]):
        for images, target in batches:
            x = images
            for layer, optimizer in zip(layers, optimizers, strict=True):
                layer.train()
                update = local_forward_backward(layer, x, target, count=len(target))
                local_update(layer, optimizer)
                x = update.output
    seconds = time.perf_counter() - began
    print(job["train"]["epochs"] * len(datasets.train.subset) / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="nine longer runs instead of five")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare_loop(arguments.bare)
        return
    pairs, epochs = (9, 20) if arguments.full else (5, 5)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = folder / "tax.yaml"
        job.write_text(JOB.format(runs=folder / "runs", epochs=epochs))
        bare(job)
        ratios, plain = [], [bare(job)]
        for _ in range(pairs):
            rate = orchestrated(job)
            plain.append(bare(job))
            ratios.append(rate / fmean(plain[-2:]))
            print(f"{len(ratios)} of {pairs}: {ratios[-1]:.3f}", flush=True)
    row = {
        "what": "orchestrator run (Ray, MLflow, progress, saves) against a bare loop",
        "images/s ratio": spread(ratios),
        "length of the bare loop, s": spread([epochs * 1347 / rate for rate in plain]),
    }
    command = "python -m benchmarks.tax" + (" --full" if arguments.full else "")
    publish("tax", command, "Orchestration tax, one stage, one thread", [row], [])


if __name__ == "__main__":
    main()
