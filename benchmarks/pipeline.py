"""Two stages on two cores against the same stages computing without communication.

    python -m benchmarks.pipeline [--full]

Three modes take turns in the same two processes, one thread each: `pipeline` (stage 0 sends every activation
to stage 1), `ceiling` (both compute at the same time on batches of their own, nothing is sent) and `alone` (one
process computes both stages). Ratios are of images/s in steady state: filling the pipeline costs one stage's time
once per run and is left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import publish, spread
from hff.architectures import HeadOptions, build_layers
from hff.local import make_optimizer
from hff.shapes import HeadShape, VggOptions, describe
from orchestrator.launch.local import _free_port
from orchestrator.pipeline.links import LinkShape, open_links
from orchestrator.pipeline.mesh import Mesh
from orchestrator.pipeline.stage import Stage, StageInput

# Two layers of equal cost: same arithmetic, and each sees a map of the same size.
OPTIONS = VggOptions(widths=(128, 128, 128), pool_after=(), first_stride=2, head_grid=4, norm="batch")
SIZE, CLASSES = 32, 10
MODES = ("pipeline", "ceiling", "alone")


def _stage(first: int, last: int, receiver: Any, sender: Any) -> Stage:
    layers = build_layers(
        OPTIONS, (3, SIZE, SIZE), HeadOptions("prototype", CLASSES), seed=0, only=range(first, last + 1)
    )
    shapes = describe(OPTIONS, (3, SIZE, SIZE), HeadShape("prototype", CLASSES, 1))
    return Stage(
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


def _worker(rank: int, address: str, token: str, transport: str, batch: int, plan: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    repetitions, window_s = plan
    shapes = describe(OPTIONS, (3, SIZE, SIZE), HeadShape("prototype", CLASSES, 1))
    ranges = ((0, 1), (2, 2))
    border = shapes[ranges[0][1]].output
    link = LinkShape(border, torch.float32, batch, CLASSES, "contiguous")
    receiver, sender = open_links(
        Mesh((1, 1)),
        rank,
        link if rank else None,
        None if rank else link,
        transport=transport,
        timeout_s=60.0,
        token=token,
        group=None,
    )
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    inner = torch.randn(batch, *border, generator=generator).relu_()
    target = torch.randint(CLASSES, (batch,), generator=generator)
    mine = _stage(*ranges[rank], receiver, sender)
    silent = _stage(*ranges[rank], None, None)
    whole = [_stage(*ranges[0], None, None), _stage(*ranges[1], None, None)]

    def step(mode: str, n: int) -> None:
        if mode == "pipeline":
            mine.train_step(StageInput(n, images, target) if rank == 0 else mine.receive())
        elif mode == "ceiling":
            silent.train_step(StageInput(n, images if rank == 0 else inner, target))
        elif rank == 0:
            whole[0].train_step(StageInput(n, images, target))
            whole[1].train_step(StageInput(n, inner, target))

    def timed(mode: str, steps: int) -> float:
        """Seconds per step of the slower worker, from the end of its first step to the end of its last."""
        dist.barrier()
        step(mode, 0)
        began = time.perf_counter()
        for n in range(1, steps):
            step(mode, n)
        taken = torch.tensor([(time.perf_counter() - began) / (steps - 1)])
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return float(taken)

    for mode in MODES:
        timed(mode, 3)
    per_step = torch.tensor([timed("ceiling", 5)])
    dist.broadcast(per_step, src=0)
    steps = max(10, round(window_s / float(per_step)))
    for _ in range(repetitions):
        for mode in MODES:
            taken = timed(mode, steps)
            if rank == 0:
                results.put((mode, taken))
    if rank == 0:
        results.put(None)
    dist.destroy_process_group()


def measure(transport: str, batch: int, repetitions: int, window_s: float) -> dict[str, Any]:
    """One row: ratios of images/s, and what was sent."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    address, token = f"tcp://127.0.0.1:{_free_port()}", uuid.uuid4().hex[:12]
    plan = (repetitions, window_s)
    workers = [
        spawn.Process(target=_worker, args=(rank, address, token, transport, batch, plan, results)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    while (item := results.get(timeout=300)) is not None:
        times[item[0]].append(item[1])
    for worker in workers:
        worker.join()
    shapes = describe(OPTIONS, (3, SIZE, SIZE), HeadShape("prototype", CLASSES, 1))
    megabytes = 4e-6 * batch * torch.Size(shapes[1].output).numel()
    return {
        "transport": transport,
        "batch": batch,
        "activation, MB": megabytes,
        "stage time, ms": spread([1e3 * t for t in times["ceiling"]]),
        "of the ceiling": spread([c / p for c, p in zip(times["ceiling"], times["pipeline"], strict=True)]),
        "against one process": spread([a / p for a, p in zip(times["alone"], times["pipeline"], strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="nine repetitions of 4 s instead of five of 1.5 s")
    arguments = parser.parse_args()
    repetitions, window_s = (9, 4.0) if arguments.full else (5, 1.5)
    rows = [measure(transport, batch, repetitions, window_s) for transport in ("shm", "gloo") for batch in (32, 128)]
    publish(
        "pipeline",
        "python -m benchmarks.pipeline" + (" --full" if arguments.full else ""),
        "Two stages on two cores, one thread each",
        rows,
        ["ceiling: the same two stages at the same time without communication; steady state, without the fill"],
    )


if __name__ == "__main__":
    main()
