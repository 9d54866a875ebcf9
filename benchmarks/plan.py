"""What the planner predicts against what the pipeline does.

    python -m benchmarks.plan [--full]

Two kinds of networks run through the real links and the real schedule. `emulated` layers sleep for their time instead
of computing, so that any number of stages fits on two cores: what is tested is transport, schedule and the choice of
ranges. `computed` layers are trained: two stages on two cores, each layer timed before on the same two processes at the
same time. Rates are in steady state, between the first and the last step that leaves the pipeline.
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import publish, spread
from hff.architectures import HeadOptions, build_layers
from hff.local import local_forward_backward, local_update, make_optimizer
from hff.shapes import HeadShape, LayerShape, VggOptions, describe
from orchestrator.pipeline.connect import open_links
from orchestrator.pipeline.cost import CPU_CORE, LayerCost
from orchestrator.pipeline.links import LinkShape, Message
from orchestrator.pipeline.mesh import Mesh
from orchestrator.pipeline.plan import Plan, make_plan
from orchestrator.pipeline.stage import Stage, StageInput
from orchestrator.run.device import keep_freed_memory
from tests.pipeline.ranks import run_ranks

CLASSES, BATCH = 10, 64
# Part of a layer's time that comes after its output has left: the update.
AFTER = 0.1
# Name, seconds of each layer at the whole batch, workers, transport.
EMULATED: tuple[tuple[str, tuple[float, ...], int, str], ...] = (
    ("6 layers, one of three times the others", (0.03, 0.03, 0.09, 0.03, 0.03, 0.03), 4, "gloo"),
    ("8 layers, one of three times the others", (0.02, 0.02, 0.06, 0.02, 0.02, 0.02, 0.02, 0.02), 4, "gloo"),
    ("12 layers, falling", tuple(0.03 - 0.002 * i for i in range(12)), 6, "shm"),
    ("16 equal layers", (0.05,) * 16, 16, "gloo"),
)
COMPUTED: tuple[tuple[str, VggOptions], ...] = (
    ("VGG 64-64-64-64", VggOptions(widths=(64, 64, 64, 64), pool_after=(1,))),
    ("VGG 32-64-128-128", VggOptions(widths=(32, 64, 128, 128), pool_after=(0, 1))),
    ("VGG 128-64-64", VggOptions(widths=(128, 64, 64), pool_after=(0,))),
)
SIZE = 24
# A map of 0.25 MB for the whole batch behind every emulated layer.
MAP = (4, 16, 16)


def _planned(shapes: Sequence[LayerShape], seconds: Sequence[float], workers: int, steps: int) -> Plan:
    """The planner's choice of ranges, one worker each; seconds are of a whole batch."""
    return make_plan(
        shapes,
        workers=workers,
        stages=workers,
        replicas=(1,) * workers,
        global_batch_size=BATCH,
        num_samples=steps * BATCH,
        num_classes=CLASSES,
        optimizer="adamw",
        target=CPU_CORE,
        costs=[LayerCost((1 - AFTER) * s / BATCH, AFTER * s) for s in seconds],
    )


def _links(rank: int, outputs: Sequence[tuple[int, ...]], transport: str, token: str) -> Any:
    def shape(stage: int) -> LinkShape:
        return LinkShape(outputs[stage], torch.float32, BATCH, CLASSES, "channels_last")

    last = len(outputs) - 1
    return open_links(
        Mesh((1,) * len(outputs)),
        rank,
        shape(rank - 1) if rank else None,
        shape(rank) if rank < last else None,
        transport=transport,
        timeout_s=120.0,
        token=token,
    )


def _sleeping(rank: int, ranges: Any, seconds: Sequence[float], transport: str, steps: int, token: str) -> float:
    """One stage that sleeps; returns seconds per step in steady state."""
    first, last = ranges[rank]
    receiver, sender = _links(rank, [MAP] * len(ranges), transport, token)
    after_s = AFTER * seconds[last]
    before_s = sum(seconds[first : last + 1]) - after_s
    x = torch.zeros(BATCH, *MAP).contiguous(memory_format=torch.channels_last)
    target = torch.zeros(BATCH, dtype=torch.int64)
    dist.barrier()
    began = 0.0
    for step in range(steps):
        if receiver is not None:
            x = receiver.recv().activation
        time.sleep(before_s)
        if sender is not None:
            sender.send(Message(step, "train", False, False, x, target))
        time.sleep(after_s)
        began = began or time.perf_counter()
    per_step = (time.perf_counter() - began) / (steps - 1)
    dist.barrier()
    return per_step


def _layer(options: VggOptions, index: int) -> Any:
    (layer,) = build_layers(options, (3, SIZE, SIZE), HeadOptions("prototype", CLASSES), seed=0, only=[index])
    return layer.to(memory_format=torch.channels_last)


def _timed_layers(rank: int, options: VggOptions, shapes: Sequence[LayerShape], repetitions: int) -> list[float]:
    """Seconds of a step of each layer, the median, one layer after the other, while the other process does the same."""
    layers = [_layer(options, index) for index in range(len(shapes))]
    optimizers = [make_optimizer(layer, "adamw", lr=1e-3) for layer in layers]
    inputs = [torch.randn(BATCH, *s.input).contiguous(memory_format=torch.channels_last) for s in shapes]
    target = torch.randint(CLASSES, (BATCH,))
    taken = torch.zeros(repetitions, len(layers), dtype=torch.float64)
    for n in range(repetitions):
        dist.barrier()
        for i, (layer, optimizer, x) in enumerate(zip(layers, optimizers, inputs, strict=True)):
            began = time.perf_counter()
            local_forward_backward(layer, x, target, count=BATCH)
            local_update(layer, optimizer)
            taken[n, i] = time.perf_counter() - began
    found: list[float] = taken[3:].median(dim=0).values.tolist()
    return found


def _computing(rank: int, options: VggOptions, ranges: Any, transport: str, steps: int, token: str) -> float:
    """One stage that trains; returns seconds per step in steady state."""
    shapes = describe(options, (3, SIZE, SIZE), HeadShape("prototype", CLASSES, 1))
    receiver, sender = _links(rank, [shapes[last].output for _, last in ranges], transport, token)
    first, last = ranges[rank]
    layers = [_layer(options, index) for index in range(first, last + 1)]
    stage = Stage(
        first=first,
        layers=layers,
        optimizers=[make_optimizer(layer, "adamw", lr=1e-3) for layer in layers],
        receiver=receiver,
        sender=sender,
        learning_rate=lambda step, layer: 1e-3,
        trained=lambda step: None,
        output_shape=shapes[last].output,
        device=torch.device("cpu"),
    )
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    target = torch.randint(CLASSES, (BATCH,))
    dist.barrier()
    began = 0.0
    for step in range(steps):
        stage.train_step(stage.receive() if receiver is not None else StageInput(step, x, target))
        began = began or time.perf_counter()
    per_step = (time.perf_counter() - began) / (steps - 1)
    dist.barrier()
    return per_step


def _equal_counts(layers: int, stages: int) -> list[tuple[int, int]]:
    return [(layers * s // stages, layers * (s + 1) // stages - 1) for s in range(stages)]


def _period(ranges: Sequence[tuple[int, int]], seconds: Sequence[float]) -> float:
    return max(sum(seconds[first : last + 1]) for first, last in ranges)


def emulated(name: str, seconds: Sequence[float], workers: int, transport: str, repetitions: int) -> dict[str, Any]:
    """One row: the chosen ranges, and against them ranges of equally many layers."""
    shape = describe(VggOptions(widths=(MAP[0],)), (MAP[0], *MAP[1:]), HeadShape("prototype", CLASSES, 1))[0]
    steps = 60
    made = _planned([shape] * len(seconds), seconds, workers, 10_000)
    ranges = [stage.layers for stage in made.stages]
    even = _equal_counts(len(seconds), workers)
    gain, off, efficiency = [], [], []
    for _ in range(repetitions):
        per_step, per_step_even = (
            run_ranks(workers, _sleeping, which, seconds, transport, steps, uuid.uuid4().hex[:12])[-1]
            for which in (ranges, even)
        )
        gain.append(per_step_even / per_step)
        off.append(BATCH / per_step / made.images_per_second)
        efficiency.append(_period(ranges, seconds) / per_step)
    return {
        "network": name,
        "layers": "emulated",
        "workers": workers,
        "transport": transport,
        "measured / predicted images/s": spread(off),
        "of the slowest stage alone": spread(efficiency),
        "against equal counts": spread(gain),
        "predicted": _period(even, seconds) / _period(ranges, seconds),
    }


def _compared(rank: int, options: VggOptions, steps: int, token: str) -> tuple[list[float], Any, float, float]:
    keep_freed_memory()  # as the workers of a run do
    shapes = describe(options, (3, SIZE, SIZE), HeadShape("prototype", CLASSES, 1))
    seconds = torch.tensor(_timed_layers(rank, options, shapes, 30))
    dist.broadcast(seconds, src=0)
    made = _planned(shapes, seconds.tolist(), 2, 10_000)
    ranges = [stage.layers for stage in made.stages]
    per_step = _computing(rank, options, ranges, "shm", steps, token)
    return seconds.tolist(), ranges, made.images_per_second, per_step


def computed(name: str, options: VggOptions, repetitions: int) -> dict[str, Any]:
    """One row: two stages that train, their layers timed just before."""
    off, efficiency = [], []
    for _ in range(repetitions):
        seconds, ranges, predicted, per_step = run_ranks(2, _compared, options, 60, uuid.uuid4().hex[:12])[-1]
        off.append(BATCH / per_step / predicted)
        efficiency.append(_period(ranges, seconds) / per_step)
    return {
        "network": name,
        "layers": "computed",
        "workers": 2,
        "transport": "shm",
        "measured / predicted images/s": spread(off),
        "of the slowest stage alone": spread(efficiency),
        "against equal counts": None,
        "predicted": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="five repetitions instead of two")
    parser.add_argument("--note", help="what a reader has to know of the machine meanwhile")
    arguments = parser.parse_args()
    repetitions = 5 if arguments.full else 2
    rows = [emulated(*network, repetitions) for network in EMULATED]
    rows += [computed(*network, repetitions) for network in COMPUTED]
    publish(
        "plan",
        "python -m benchmarks.plan" + (" --full" if arguments.full else ""),
        "Predicted and measured pipelines",
        rows,
        [
            "emulated: layers sleep for their time; transport, schedule and choice of ranges are real",
            "against equal counts: images/s of the planner's ranges over those of equally many layers per stage",
            *([arguments.note] if arguments.note else []),
        ],
    )


if __name__ == "__main__":
    main()
