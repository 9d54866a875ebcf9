"""A stage by itself, or two of one process, as tests need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hff import LocalLayer, make_optimizer
from orchestrator.pipeline.links import LinkShape, Message, Slot
from orchestrator.pipeline.stage import Stage


def lone_stage(
    layers: Sequence[LocalLayer], *, optimizers: Sequence[torch.optim.Optimizer] | None = None, **options: Any
) -> Stage:
    """The `layers` with neighbours on neither side, trained by AdamW at 1e-2, for images of 8 x 8 pixels."""
    channels = next(iter(layers[-1].body.parameters())).shape[0]
    return Stage(
        layers=list(layers),
        optimizers=list(optimizers or [make_optimizer(layer, "adamw", lr=1e-2) for layer in layers]),
        learning_rate=lambda step, layer: 1e-2,
        trained=lambda step: None,
        device=torch.device("cpu"),
        **{"first": 0, "receiver": None, "sender": None, "output_shape": (channels, 8, 8)} | options,
    )


class Passage:
    """Both ends of a link within one process, for one message at a time, which lies in a slot as between two."""

    waited_s, bytes_total = 0.0, 0

    def __init__(self, activation: tuple[int, ...], dtype: torch.dtype = torch.float32, classes: int = 3) -> None:
        shape = LinkShape(activation, dtype, max_batch=32, num_classes=classes, memory_format="channels_last")
        self._slot = Slot(shape, torch.zeros(shape.slot_bytes, dtype=torch.uint8))

    def send(self, message: Message) -> None:
        self._slot.write(message)

    def recv(self) -> Message:
        return self._slot.read()

    def close(self) -> None:
        return
