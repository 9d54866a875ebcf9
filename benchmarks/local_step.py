"""Local step against BP: images/s and activation memory of the same network on one device.

    python -m benchmarks.local_step [--full] [--no-compile]

Both sides: same layers, batch, optimizer, channels_last, random images already on the device. On a CPU with one
thread, with one for each core, and with one and both sides compiled by torch.compile (minutes; needs a C++ compiler).
Interleaved, five repetitions or more; memory is what autograd keeps for backward, counted by storage, on a GPU the
peak allocated.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from benchmarks.common import publish, spread
from benchmarks.memory import Held
from hff.architectures import HeadOptions, build_layers
from hff.layers import LocalLayer
from hff.local import local_forward_backward, local_update, make_optimizer
from hff.shapes import VggOptions
from orchestrator.run.device import compile_layers, keep_freed_memory

Step = Callable[[Tensor, Tensor], None]

NETWORKS: dict[str, tuple[VggOptions, int, int, int]] = {
    # name: options, image size, batch, classes
    "VGG 64-128-256-256, 32 px": (VggOptions(widths=(64, 128, 256, 256), pool_after=(0, 1, 2)), 32, 100, 10),
    "VGG-13-like, 224 px": (
        VggOptions(widths=(64, 64, 128, 128, 256, 256, 512, 512, 512, 512), pool_after=(1, 3, 5, 7, 9), head_grid=2),
        224,
        8,
        1000,
    ),
}


def _layers(options: VggOptions, size: int, classes: int, kind: str, aux_convs: int = 0) -> list[LocalLayer]:
    head = HeadOptions(kind="linear" if kind == "bp" else "prototype", num_classes=classes, aux_convs=aux_convs)
    built = build_layers(options, (3, size, size), head, seed=0, end_to_end=kind == "bp")
    return [layer.to(memory_format=torch.channels_last) for layer in built]


def local_step(layers: Sequence[LocalLayer]) -> Step:
    optimizers = [make_optimizer(layer, "adamw", lr=1e-3) for layer in layers]

    def step(x: Tensor, target: Tensor) -> None:
        for layer, optimizer in zip(layers, optimizers, strict=True):
            update = local_forward_backward(layer, x, target, count=len(target))
            local_update(layer, optimizer)
            x = update.output

    return step


def bp_step(layer: LocalLayer, *, recomputed: bool = False, pieces: int = 1, whole: bool = False) -> Step:
    """BP over the same layers; with activation recomputation, in `pieces` micro-batches, or the body `whole`."""
    optimizer = make_optimizer(layer, "adamw", lr=1e-3)
    bodies = list(layer.body) if isinstance(layer.body, nn.Sequential) and not whole else [layer.body]

    def forward(x: Tensor) -> Tensor:
        for body in bodies:
            x = recompute(body, x, use_reentrant=False) if recomputed else body(x)
        return layer.head(x)

    def step(x: Tensor, target: Tensor) -> None:
        for x_part, t_part in zip(x.chunk(pieces), target.chunk(pieces), strict=True):
            loss = layer.head.loss(forward(x_part), t_part).sum() / len(target)
            loss.backward()
        local_update(layer, optimizer)

    return step


def saved_bytes(step: Step, x: Tensor, target: Tensor) -> int:
    """Largest sum of distinct storages that autograd holds for backward at any time of one step."""
    if x.is_cuda:
        step(x, target)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x, target)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Held() as held:
        step(x, target)
    return held.peak_bytes


def seconds(step: Step, x: Tensor, target: Tensor, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        step(x, target)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def measure(
    name: str, device: torch.device, repetitions: int, window_s: float, *, threads: int = 1, compiled: bool = False
) -> list[dict[str, Any]]:
    """The rows of one network: every method against BP of the same threads, compiled like it or not."""
    options, size, batch, classes = NETWORKS[name]
    if device.type == "cuda":
        batch *= 8
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(device, memory_format=torch.channels_last)
    target = torch.randint(classes, (batch,), generator=generator).to(device)

    def fresh(kind: str, aux_convs: int = 0) -> list[LocalLayer]:
        layers = [layer.to(device) for layer in _layers(options, size, classes, kind, aux_convs)]
        if compiled:
            compile_layers(layers)
        return layers

    variants: dict[str, Step] = {"BP": bp_step(fresh("bp")[0], whole=compiled), "local, S0": local_step(fresh("hff"))}
    if threads == 1 and not compiled:
        variants["local, S1 (1 hidden convolution)"] = local_step(fresh("hff", 1))
        variants["BP + checkpointing"] = bp_step(fresh("bp")[0], recomputed=True)
        variants["BP + accumulation of 4"] = bp_step(fresh("bp")[0], pieces=4)
    memory = {key: saved_bytes(step, x, target) for key, step in variants.items()}
    steps = {key: max(1, round(window_s / seconds(step, x, target, 1))) for key, step in variants.items()}
    times: dict[str, list[float]] = {key: [] for key in variants}
    for _ in range(repetitions):
        for key, step in variants.items():
            times[key].append(seconds(step, x, target, steps[key]))
    return [
        {
            "network": name,
            "method": key,
            "threads": threads if device.type == "cpu" else None,
            "compiled": "both" if compiled else "no",
            "images/s against BP": spread([b / t for b, t in zip(times["BP"], times[key], strict=True)]),
            "activation memory against BP": memory[key] / memory["BP"],
            "step, ms": 1e3 * statistics.median(times[key]),
            "batch": batch,
            "device": device.type,
        }
        for key in variants
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="nine repetitions of 3 s instead of five of 1 s")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled rows")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the workers of a run do; for both sides
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    windows = (9, 3.0) if arguments.full else (5, 1.0)
    rows = []
    for device in devices:
        for name in NETWORKS:
            rows += measure(name, device, *windows)
            if device.type == "cpu" and (cores := os.cpu_count() or 1) > 1:
                rows += measure(name, device, *windows, threads=cores)
            if not arguments.no_compile:
                rows += measure(name, device, *windows, compiled=True)
    notes = [
        "BP + checkpointing: what is kept between forward and backward; the layer being recomputed comes on top",
        "CPU: freed memory stays with the process (mallopt), as in the workers of a run; for all methods",
    ]
    if len(devices) == 1:
        notes.append("GPU: not measured (no GPU on this machine)")
    publish(
        "local_step",
        "python -m benchmarks.local_step" + (" --full" if arguments.full else ""),
        "Local step against BP, one device",
        rows,
        notes,
    )


if __name__ == "__main__":
    main()
