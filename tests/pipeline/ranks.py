"""Processes that form a gloo group, forked from one that has imported torch: each start costs no seconds."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import free_port


def start_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(*arguments)` in a process of its own, which is forked from one that has imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    # One server for all tests of this process, those that run whole jobs too.
    context.set_forkserver_preload(["tests.pipeline.ranks", "orchestrator.launch.workers.fork_server", work.__module__])
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def run_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` returns on each of `world_size` processes, one thread each, by rank."""
    address = f"tcp://127.0.0.1:{free_port()}"
    results = multiprocessing.get_context("forkserver").SimpleQueue()
    workers = [start_process(_rank, rank, world_size, address, results, work, arguments) for rank in range(world_size)]
    try:
        found = dict(results.get() for _ in workers)
    finally:
        for worker in workers:
            worker.join(60)
            if worker.is_alive():
                worker.kill()
    failures = [f"rank {rank}:\n{failure}" for rank, (failure, _) in sorted(found.items()) if failure]
    assert not failures, "\n".join(failures)
    return [found[rank][1] for rank in range(world_size)]


def _rank(rank: int, world_size: int, address: str, results: Any, work: Callable[..., Any], arguments: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    failure, result = None, None
    try:
        dist.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
        )
        result = work(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        failure = traceback.format_exc()
    results.put((rank, (failure, result)))
