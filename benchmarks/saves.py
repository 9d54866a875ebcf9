"""What a checkpoint costs: seconds of a save and of reading it back, the interval to save at, and the rate at it.

    python -m benchmarks.saves [--full]

Networks of three sizes with their optimizer state are saved as a run of one worker does, in the run folder of the
system's disk for temporary files: once waited for (copied, written, hashed, flushed), once in the background, where
training stands still for the copy alone. To resume is to check every hash and to load weights and optimizer. Times of a
plain write and flush of as many bytes stand beside. The interval is the one at which saves that are waited for would
cost 2 %.

Then a network trains at that interval, 5 s at least, and saves in the background in every other window of this length:
images/s of neighbouring windows with and without a save, beside a free core and on all cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import interval, publish, spread
from hff import HeadOptions, LocalLayer, VggOptions, build_layers, make_optimizer
from orchestrator.pipeline.stage import Stage, StageInput
from orchestrator.run import checkpoint
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder
from orchestrator.run.saving import Saver

SIZES = {"small": (128, 256), "middle": (256, 512, 512), "large": (512, 1024, 1024, 1024)}
# A save may take so much of the time between two.
SHARE = 0.02
BATCH = 32
WINDOW_S = 5.0
PAIRS = 20


def trained(widths: tuple[int, ...]) -> tuple[list[LocalLayer], list[torch.optim.Optimizer]]:
    """Layers with the full state of AdamW."""
    layers = build_layers(VggOptions(widths=widths), (3, 8, 8), HeadOptions(num_classes=100), seed=0)
    optimizers = [make_optimizer(layer, "adamw", lr=1e-3) for layer in layers]
    for layer, optimizer in zip(layers, optimizers, strict=True):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return layers, optimizers


def stage_of(layers: list[LocalLayer], optimizers: list[torch.optim.Optimizer]) -> Stage:
    return Stage(
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


def saver(folder: RunFolder, stage: Stage, *, background: bool) -> Saver:
    return Saver(folder, 1, stage, Control(1), writes=True, leads=True, keep_last=2, background=background)


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
    stage = stage_of(layers, optimizers)
    waited_for, beside = (saver(folder, stage, background=background) for background in (False, True))
    saved, held_up, restores, writes = [], [], [], []
    for step in range(repetitions):
        began = time.perf_counter()
        waited_for.save(2 * step, {"step": step}, must=False)
        saved.append(time.perf_counter() - began)
        began = time.perf_counter()
        beside.save(2 * step + 1, {"step": step}, must=False)
        held_up.append(time.perf_counter() - began)
        beside.drain()
        beside.check()
        began = time.perf_counter()
        newest, _ = checkpoint.newest_valid(folder)
        assert newest is not None
        for index, (layer, optimizer) in enumerate(zip(layers, optimizers, strict=True)):
            checkpoint.load_layer(newest, index, layer, optimizer)
        restores.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in newest.iterdir())
        writes.append(seconds_of_a_write(scratch / "plain", size))
    return {
        "network": name,
        "checkpoint, MB": round(size / 1e6),
        "save, s": spread(saved),
        "training waits for one in the background, s": spread(held_up),
        "plain write, s": spread(writes),
        "check and load, s": spread(restores),
        "save every ... s": round(median(saved) * (1 - SHARE) / SHARE, 1),
    }


def window(stage: Stage, saves: Saver | None, first: int, seconds: float) -> tuple[int, float]:
    """Train for so long, with a save after the first step; returns steps and images/s. What it saves ends with it."""
    x = torch.randn(BATCH, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    target = torch.randint(100, (BATCH,))
    began, step = time.perf_counter(), first
    while step == first or time.perf_counter() - began < seconds:
        stage.train_step(StageInput(step, x, target))
        step += 1
        if saves is not None and step == first + 1:
            saves.save(step, {"step": step}, must=False)
    if saves is not None:
        saves.drain()
        saves.check()
    return step - first, BATCH * (step - first) / (time.perf_counter() - began)


def with_and_without(name: str, scratch: Path, every_s: float, pairs: int, threads: int) -> dict[str, Any]:
    """One run whose windows save and do not save in turn; who is first in a pair changes too."""
    torch.set_num_threads(threads)
    stage = stage_of(*trained(SIZES[name]))
    folder = RunFolder(scratch / f"{name}-{threads}")
    saves = saver(folder, stage, background=True)
    seconds, ratios = max(WINDOW_S, every_s), []
    step, _ = window(stage, saves, 0, WINDOW_S)
    for pair in range(pairs):
        rates = {}
        for side in (True, False) if pair % 2 else (False, True):
            steps, rates[side] = window(stage, saves if side else None, step, seconds)
            step += steps
        ratios.append(rates[True] / rates[False])
    waits = [e["training_waited_s"] for e in folder.read_events()[0] if e["event"] == "checkpoint"][1:]
    assert len(waits) == pairs
    return {
        "network": name,
        "threads": threads,
        "a save every ... s": seconds,
        "images/s with saves / without": interval(ratios),
        "training waits for a save, s": spread(waits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="fifteen saves of each size, and rates of the second too")
    arguments = parser.parse_args()
    load = f"Load of the machine before: {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores."
    command = "python -m benchmarks.saves" + (" --full" if arguments.full else "")
    with tempfile.TemporaryDirectory() as scratch:
        torch.set_num_threads(1)
        rows = [measured(name, Path(scratch), 15 if arguments.full else 5) for name in SIZES]
        publish("saves", command, "Cost of a checkpoint", rows, ["one thread; to resume: check and load", load])
        every_s = {row["network"]: row["save every ... s"] for row in rows}
        chosen = [(name, threads) for name in ("small", "middle")[: 2 if arguments.full else 1] for threads in (1, 2)]
        rates = [with_and_without(name, Path(scratch), every_s[name], PAIRS, threads) for name, threads in chosen]
    notes = [f"median of {PAIRS} ratios of neighbouring windows of that length and its bootstrap 95 % interval", load]
    publish("saves_background", command, "Training with saves in the background", rates, notes)


if __name__ == "__main__":
    main()
