"""The user's own objective: its head made from the job's options, and tried before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hff.architectures import OwnHead, make_head
from hff.objectives import Head
from hff.randomness import seeded
from orchestrator.errors import JobError
from orchestrator.job import own_code
from orchestrator.run.own_code import own_class, told

_SAMPLES = 2


def own_head(objective: Mapping[str, Any], num_classes: int) -> OwnHead:
    """The head that a resolved `objective` section with a file asks for. Raises JobError."""
    kind = own_class("objective", objective, Head)
    return OwnHead(kind, num_classes, own_code.options("objective", objective))


def try_head(objective: Mapping[str, Any], features: int, num_classes: int) -> None:
    """Make an own head once and show it two samples, before anything starts. Raises JobError for what cannot train."""
    if objective["name"] != "own":
        return
    own, path = own_head(objective, num_classes), str(objective["file"])
    place = f"objective: {objective['class']} of {path}"
    try:
        with seeded(0):
            head = make_head(own, features, grid=1)
    except Exception as error:
        options = ", ".join(own.options) or "none"
        raise JobError(f"{place}: cannot be made with its options ({options}): {told(error, path)}") from error
    try:
        with seeded(0):
            logit_BC = head.logits(torch.randn(_SAMPLES, features))
            loss_B = head.loss(logit_BC, torch.zeros(_SAMPLES, dtype=torch.int64))
    except Exception as error:
        raise JobError(f"{place}: cannot judge features ({_SAMPLES}, {features}): {told(error, path)}") from error
    for what, got, wanted in (
        ("logits", logit_BC, (_SAMPLES, num_classes)),
        ("loss", loss_B, (_SAMPLES,)),
    ):
        shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        if shape != wanted:
            raise JobError(f"{place}: {what} must have the shape {wanted} for {_SAMPLES} samples, got {shape}")
