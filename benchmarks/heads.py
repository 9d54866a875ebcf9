"""What prototype heads of 1000 classes x 4 prototypes x 2048 numbers, one on every layer, take of the step.

    python -m benchmarks.heads [--full]

The stack is VGG-13-like at 224 pixels, one thread. The head's part of a layer is timed by itself, on the layer's own
output: pooling, scores, loss, its gradient down to that output, its AdamW step and its constraint.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import publish, spread
from benchmarks.local_step import NETWORKS, local_step, seconds
from hff.architectures import HeadOptions, build_layers
from hff.layers import LocalLayer
from hff.local import local_update, make_optimizer
from hff.objectives import PrototypeHead, pool_to_cells
from orchestrator.run.device import keep_freed_memory

CLASSES, PROTOTYPES, FEATURES = 1000, 4, 2048
BATCHES = (8, 32)
# Cells of the pooled map by the width of a layer, so that every head sees 2048 numbers.
CELLS = {64: (8, 4), 128: (4, 4), 256: (4, 2), 512: (2, 2)}


class WideHead(PrototypeHead):
    """Prototypes on a map pooled to cells that need not be square."""

    def __init__(self, width: int) -> None:
        super().__init__(FEATURES, CLASSES, grid=0, prototypes_per_class=PROTOTYPES)
        self.cells = CELLS[width]

    def flat(self, y: Tensor) -> Tensor:
        return pool_to_cells(y, self.cells).flatten(1)


def stack() -> tuple[list[LocalLayer], int]:
    """The layers, each with such a head, and the size of an image."""
    options, size, _, _ = NETWORKS["VGG-13-like, 224 px"]
    layers = build_layers(options, (3, size, size), HeadOptions(num_classes=CLASSES), seed=0)
    for layer, width in zip(layers, options.widths, strict=True):
        layer.head = WideHead(width)
    return [layer.to(memory_format=torch.channels_last) for layer in layers], size


def head_seconds(layers: list[LocalLayer], outputs: list[Tensor], target: Tensor) -> float:
    """One step of all heads, on what the layers put out."""
    optimizers = [
        make_optimizer(LocalLayer(layer.name, torch.nn.Identity(), layer.head), "adamw", lr=1e-3) for layer in layers
    ]
    for _ in range(2):  # the first makes the state of the optimizers
        began = time.perf_counter()
        for layer, optimizer, output in zip(layers, optimizers, outputs, strict=True):
            y = output.detach().requires_grad_()
            loss_B = layer.head.loss(layer.head.judge(y)[1], target)
            (loss_B.sum() / len(target)).backward()
            local_update(layer, optimizer)
        took = time.perf_counter() - began
    return took


def measure(batch: int, repetitions: int) -> dict[str, Any]:
    layers, size = stack()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
    target = torch.randint(CLASSES, (batch,), generator=generator)
    step = local_step(layers)
    step(x, target)
    outputs = [x]
    with torch.no_grad():
        for layer in layers:
            outputs.append(layer(outputs[-1]))
    shares, whole = [], []
    for _ in range(repetitions):
        whole.append(seconds(step, x, target, 1))
        shares.append(100 * head_seconds(layers, outputs[1:], target) / whole[-1])
    return {
        "batch": batch,
        "layers": len(layers),
        "numbers in heads, M": sum(layer.head.prototypes.numel() for layer in layers) / 1e6,
        "step, s": spread(whole),
        "heads, % of the step": spread(shares),
        "at most": 15,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="nine repetitions instead of three")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the workers of a run do
    publish(
        "heads",
        "python -m benchmarks.heads" + (" --full" if arguments.full else ""),
        f"Heads of {CLASSES} classes x {PROTOTYPES} prototypes x {FEATURES} numbers on every layer, one CPU thread",
        [measure(batch, 9 if arguments.full else 3) for batch in BATCHES],
        [
            "VGG-13-like at 224 pixels; the heads' part: pooling, scores, loss, gradient to the layer's output, AdamW",
            "GPU: not measured",
        ],
    )


if __name__ == "__main__":
    main()
