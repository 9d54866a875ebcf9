"""A batch that does not fit is computed in the parts that the plan chose, in the memory that the plan was given."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path
from typing import Any

import torch

from hff import HeadOptions, VggOptions, build_layers
from hff.shapes import HeadShape, describe
from orchestrator.pipeline.plan import Plan, make_plan
from orchestrator.pipeline.stage import StageInput
from tests.pipeline.ranks import start_process
from tests.stages import lone_stage

# A map four times as large as what is handed on: nearly all of the memory is that of one part.
NETWORK, IMAGE, BATCH, CLASSES = VggOptions(widths=(16, 16), pool_after=(0, 1), norm="none"), (3, 64, 64), 128, 10


def plan(micro_batches: int | str, limit_bytes: float | None = None) -> Plan:
    return make_plan(
        describe(NETWORK, IMAGE, HeadShape("prototype", CLASSES, 1)),
        workers=1,
        stages=1,
        global_batch_size=BATCH,
        num_samples=1000,
        num_classes=CLASSES,
        optimizer="adamw",
        micro_batches=micro_batches,
        memory_limit_bytes=limit_bytes,
    )


def _train_within(limit_bytes: int, micro_batches: int, results: Any) -> None:
    """A step and an evaluation in a process that can get no more than `limit_bytes` on top of torch, the network and
    the images."""
    torch.set_num_threads(1)
    layers = build_layers(NETWORK, IMAGE, HeadOptions(num_classes=CLASSES), seed=0)
    stage = lone_stage([x.to(memory_format=torch.channels_last) for x in layers], micro_batches=micro_batches)
    x = torch.randn(BATCH, *IMAGE).contiguous(memory_format=torch.channels_last)
    target = torch.randint(CLASSES, (BATCH,))
    stage.train_step(StageInput(0, x[:2], target[:2]))  # what torch allocates once
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    said = ""
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + limit_bytes,) * 2)
    try:
        stage.train_step(StageInput(1, x, target))
        said = "trained"
        correct = torch.zeros(2, dtype=torch.int64)
        stage.evaluate(StageInput(2, x, target), (0.0, 1.0), correct)
        results.put(f"{said}, evaluated")
    except RuntimeError as error:
        results.put(f"{said}{error}")


def test_what_does_not_fit_at_once_is_trained_in_the_parts_that_the_plan_chooses_for_the_limit() -> None:
    limit_bytes = plan(8).stages[0].memory_bytes
    assert limit_bytes < 0.5 * plan(1).stages[0].memory_bytes
    chosen = plan("auto", limit_bytes)
    assert 1 < chosen.micro_batches <= 8
    results = multiprocessing.get_context("forkserver").SimpleQueue()
    said = []
    for parts in (1, chosen.micro_batches):
        process = start_process(_train_within, limit_bytes, parts, results)
        process.join(60)
        said.append(results.get())
    assert "DefaultCPUAllocator" in said[0], said[0]
    assert said[1] == "trained, evaluated"
