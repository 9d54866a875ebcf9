"""Dropout depends on seed, step, layer and replica: not on the stage that a layer is in, nor on when a run began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hff import HeadOptions, MlpOptions, build_layers
from orchestrator.pipeline.stage import Stage, StageInput
from tests.pipeline.ranks import run_ranks
from tests.stages import Passage, lone_stage

OPTIONS, HEAD = MlpOptions(widths=(16, 16, 16), dropout=0.5), HeadOptions("linear", num_classes=3)
STEPS = 4


def a_stage(layers: Sequence[int], **options: Any) -> Stage:
    built = build_layers(OPTIONS, (1, 8, 8), HEAD, seed=0, only=layers)
    return lone_stage(built, first=layers[0], **options)


def batch(step: int, samples: int = 8) -> StageInput:
    generator = torch.Generator().manual_seed(step)
    return StageInput(step, torch.randn(samples, 1, 8, 8, generator=generator), torch.arange(samples) % 3)


def begun_again(stage: Stage) -> Stage:
    """A stage of another process that goes on from the state of this one."""
    other = a_stage(range(stage.first, stage.first + len(stage.layers)))
    for ours, theirs in zip(other.layers, stage.layers, strict=True):
        ours.load_state_dict(theirs.state_dict())
    for mine, its in zip(other.optimizers, stage.optimizers, strict=True):
        mine.load_state_dict(its.state_dict())
    torch.manual_seed(99)
    return other


def test_layers_in_two_stages_of_which_one_begins_again_learn_as_in_one() -> None:
    whole, below, above = a_stage([0, 1, 2]), a_stage([0]), a_stage([1, 2])
    below.sender = link = Passage((16,))
    for step in range(STEPS):
        whole.train_step(batch(step))
    for step in range(STEPS):
        above = begun_again(above) if step == STEPS // 2 else above
        below.train_step(batch(step))
        torch.rand(step)  # something else draws in this process
        above.receiver = link
        above.train_step(above.receive())
    for ours, theirs in zip([*below.layers, *above.layers], whole.layers, strict=True):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), f"{ours.name}, {name}"


def dropped(step: int = 0, **options: Any) -> list[bool]:
    """Which outputs of an untrained layer are zero at a step, for the same images."""
    stage = a_stage([0], **options)
    stage.sender = link = Passage((16,))
    stage.train_step(replace(batch(0), step=step))
    zero: list[bool] = (link.recv().activation == 0).flatten().tolist()
    return zero


def test_another_step_or_seed_drops_others() -> None:
    assert dropped() == dropped()
    assert len({tuple(dropped(**use)) for use in ({}, {"step": 1}, {"seed": 1}, {"step": 1, "seed": 1})}) == 4


def _as_replica(rank: int) -> list[bool]:
    assert dist.group.WORLD is not None
    return dropped(replicas=dist.group.WORLD)


@pytest.mark.slow
def test_replicas_drop_others_each() -> None:
    first, second = run_ranks(2, _as_replica)
    assert first == dropped()
    assert second != first
