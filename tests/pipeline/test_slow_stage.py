"""A stage five times as slow as the others: bounded memory before it, and its name in the end."""

from __future__ import annotations

import resource
import time
import uuid
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hff import HeadOptions, VggOptions, build_layers, make_optimizer
from orchestrator.pipeline.advice import advise
from orchestrator.pipeline.connect import open_links
from orchestrator.pipeline.links import LinkShape
from orchestrator.pipeline.mesh import SLOTS, Mesh
from orchestrator.pipeline.stage import Stage, StageInput
from orchestrator.run.records.events import stage_times
from tests.pipeline.ranks import run_ranks

# Messages of 2 MB: the noise of the allocator is 1.
STAGES, SLOW, BATCH, STEPS = 3, 1, 64, 40
OPTIONS = VggOptions(widths=(8, 8, 8))
MAP = (8, 32, 32)
MESSAGE_BYTES = 4 * BATCH * 8 * 32 * 32


def _stage(rank: int, transport: str, token: str) -> Stage:
    link = LinkShape(MAP, torch.float32, BATCH, 3, "channels_last")
    receiver, sender = open_links(
        Mesh((1,) * STAGES),
        rank,
        link if rank else None,
        link if rank < STAGES - 1 else None,
        transport=transport,
        timeout_s=60.0,
        token=token,
    )
    layers = build_layers(OPTIONS, (3, 32, 32), HeadOptions(num_classes=3), seed=0, only=[rank])
    return Stage(
        first=rank,
        layers=[layer.to(memory_format=torch.channels_last) for layer in layers],
        optimizers=[make_optimizer(layer, "adamw", lr=1e-3) for layer in layers],
        receiver=receiver,
        sender=sender,
        learning_rate=lambda step, layer: 1e-3,
        trained=lambda step: None,
        output_shape=MAP,
        device=torch.device("cpu"),
    )


def _train(rank: int, transport: str, token: str) -> dict[str, Any]:
    stage = _stage(rank, transport, token)
    nap_s = 0.1 if rank == SLOW else 0.02
    stage.layers[0].register_forward_pre_hook(lambda *_: time.sleep(nap_s))
    x = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    target = torch.zeros(BATCH, dtype=torch.int64)
    done, peaks = [], []
    for step in range(STEPS):
        began = time.perf_counter()
        stage.train_step(stage.receive() if rank else StageInput(step, x, target))
        stage.times.wall_s += time.perf_counter() - began
        done.append(time.monotonic())
        peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    totals, times = stage.take_totals()
    # As in a run, nobody closes a link before all are done.
    dist.barrier()
    return {"done": done, "peaks": peaks, "times": times, "stage": rank, "layer_s": [t.seconds for t in totals]}


@pytest.mark.parametrize("transport", ["shm", "gloo", "nccl"])
def test_a_slow_stage_holds_memory_flat_before_it_and_is_named(transport: str) -> None:
    parts = run_ranks(STAGES, _train, transport, uuid.uuid4().hex[:12])
    first, slow = parts[0], parts[SLOW]
    ahead = [sum(end < moment for end in first["done"]) - n for n, moment in enumerate(slow["done"])]
    assert max(ahead) <= 2 * SLOTS + 1, "buffers of both ends, and the step in work"
    grown = first["peaks"][-1] - first["peaks"][STEPS // 2]
    assert grown < 2 * MESSAGE_BYTES, "half of the steps are 20 messages"
    times = stage_times(parts, [(i, i) for i in range(STAGES)])
    assert times[0].fraction(times[0].wait_output_s) > 0.5, "it waits for a free buffer"
    assert times[2].fraction(times[2].wait_input_s) > 0.5
    found = advise(times, BATCH, ["conv0", "conv1", "conv2"])
    assert found is not None
    assert found.stage == SLOW
    assert found.text.startswith("Stage 1 (conv1) sets the pace")
    assert "Give it 2 replicas (cluster.workers: 4, cluster.replicas: [1, 2, 1])" in found.text
