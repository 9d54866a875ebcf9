"""A stage by itself, as tests of one process need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hff import LocalLayer, make_optimizer
from orchestrator.pipeline.stage import Stage


def lone_stage(
    layers: Sequence[LocalLayer], *, optimizers: Sequence[torch.optim.Optimizer] | None = None, **options: Any
) -> Stage:
    """The `layers` with neighbours on neither side, trained by AdamW at 1e-2, for images of 8 x 8 pixels."""
    channels = next(iter(layers[-1].body.parameters())).shape[0]
    return Stage(
        layers=list(layers),
        optimizers=list(optimizers or [make_optimizer(layer, "adamw", lr=1e-2) for layer in layers]),
        receiver=None,
        sender=None,
        learning_rate=lambda step, layer: 1e-2,
        trained=lambda step: None,
        output_shape=(channels, 8, 8),
        device=torch.device("cpu"),
        **{"first": 0} | options,
    )
