"""What a checkpoint costs: seconds of a save and of reading it back, and the interval that keeps saves below 2 %.

    python -m benchmarks.saves [--full]

Training waits while a checkpoint is written, hashed and flushed. Networks of three sizes with their optimizer state are
saved as a run of one worker does, in the run folder of the system's disk for temporary files. To resume is to check
every hash and to load weights and optimizer. Times of a plain write and flush of as many bytes stand beside.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import publish, spread
from hff import HeadOptions, LocalLayer, VggOptions, build_layers, make_optimizer
from orchestrator.pipeline.stage import Stage
from orchestrator.run import checkpoint
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder
from orchestrator.run.saving import Saver

SIZES = {"small": (128, 256), "middle": (256, 512, 512), "large": (512, 1024, 1024, 1024)}
# A save may take so much of the time between two.
SHARE = 0.02


def trained(widths: tuple[int, ...]) -> tuple[list[LocalLayer], list[torch.optim.Optimizer]]:
    """Layers with the full state of AdamW."""
    layers = build_layers(VggOptions(widths=widths), (3, 8, 8), HeadOptions(num_classes=100), seed=0)
    optimizers = [make_optimizer(layer, "adamw", lr=1e-3) for layer in layers]
    for layer, optimizer in zip(layers, optimizers, strict=True):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return layers, optimizers


def saver(folder: RunFolder, layers: list[LocalLayer], optimizers: list[torch.optim.Optimizer]) -> Saver:
    stage = Stage(
        first=0,
        layers=layers,
        optimizers=optimizers,
        receiver=None,
        sender=None,
        learning_rate=lambda step, layer: 1e-3,
        trained=lambda step: None,
        output_shape=(1,),
        device=torch.device("cpu"),
    )
    return Saver(folder, 1, stage, Control(1), writes=True, leads=True, keep_last=2)


def seconds_of_a_write(path: Path, size: int) -> float:
    data = os.urandom(size)
    began = time.perf_counter()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def measured(name: str, scratch: Path, repetitions: int) -> dict[str, Any]:
    layers, optimizers = trained(SIZES[name])
    folder = RunFolder(scratch / name)
    saves, restores, writes = saver(folder, layers, optimizers), [], []
    saved = []
    for step in range(repetitions):
        began = time.perf_counter()
        saves.save(step, {"step": step}, must=True)
        saved.append(time.perf_counter() - began)
        began = time.perf_counter()
        newest, _ = checkpoint.newest_valid(folder)
        assert newest is not None
        for index, (layer, optimizer) in enumerate(zip(layers, optimizers, strict=True)):
            checkpoint.load_layer(newest, index, layer, optimizer)
        restores.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in newest.iterdir())
        writes.append(seconds_of_a_write(scratch / "plain", size))
    return {
        "checkpoint, MB": round(size / 1e6),
        "save, s": spread(saved),
        "plain write, s": spread(writes),
        "check and load, s": spread(restores),
        "save every ... s for 2 %": round(sorted(saved)[len(saved) // 2] * (1 - SHARE) / SHARE, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="fifteen saves of each size instead of five")
    arguments = parser.parse_args()
    load = f"Load of the machine before: {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores."
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measured(name, Path(scratch), 15 if arguments.full else 5) for name in SIZES]
    command = "python -m benchmarks.saves" + (" --full" if arguments.full else "")
    publish("saves", command, "Cost of a checkpoint", rows, ["Training waits for a save; none is asynchronous.", load])


if __name__ == "__main__":
    main()
