"""trace.json: the steps that a job wants traced, of all workers, gathered by rank 0."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from orchestrator.pipeline.connect import host_id
from orchestrator.pipeline.mesh import Mesh
from orchestrator.pipeline.trace import Trace, WorkerSpans, chrome_trace, traced_steps
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder, write_atomically

if TYPE_CHECKING:
    from orchestrator.run.worker import Assignment

# Questions to rank 0 for its clock.
_ROUNDS = 8


class Tracer:
    """What all workers do together for a trace; nothing where the job wants none."""

    def __init__(self, assignment: Assignment, mesh: Mesh, rank: int, control: Control) -> None:
        self._wanted: int = assignment.job["tracking"]["trace_steps"]
        self._names = assignment.layer_names
        self._rank, self._mesh, self._control = rank, mesh, control
        self._offset_ns = 0

    def begin(self, start: int, total: int, device: torch.device) -> Trace:
        """The trace of this worker, with the clocks compared. Every worker calls this."""
        steps = traced_steps(self._wanted, start, total)
        if not steps:
            self._wanted = 0
            return Trace()
        self._offset_ns = clock_offset_ns(self._rank, self._control.world_size, self._control.group)
        return Trace(steps, functools.partial(_computed, device) if device.type == "cuda" else None)

    def collect(self, folder: RunFolder, trace: Trace) -> None:
        """Rank 0 writes what was traced so far, once. Every worker calls this after the same step."""
        trace.end()
        if not self._wanted or not trace.over:
            return
        self._wanted = 0
        stage, replica = self._mesh.place(self._rank)
        mine = WorkerSpans(self._rank, stage, replica, self._offset_ns, trace.take())
        workers = self._control.gather(mine)
        if self._rank == 0:
            write_atomically(folder.trace, json.dumps(chrome_trace(workers, self._names)) + "\n")


def _computed(device: torch.device) -> None:
    """Wait for what is computed, and not for transfers beside it, which end when a neighbour has time for them."""
    torch.cuda.current_stream(device).synchronize()


def clock_offset_ns(rank: int, world_size: int, group: dist.ProcessGroup | None) -> int:
    """What to add to this worker's clock for that of rank 0; every worker calls this.

    On one host all read the same clock. Across hosts rank 0 is asked a few times, and its answer is taken to be from
    the middle of the quickest round: wrong by half of that round trip at most.
    """
    if world_size == 1:
        return 0
    hosts: list[str] = [""] * world_size
    dist.all_gather_object(hosts, host_id(), group=group)
    return _asked(rank, [r for r in range(world_size) if hosts[r] != hosts[0]], group)


def _asked(rank: int, others: Sequence[int], group: dist.ProcessGroup | None) -> int:
    """Rank 0 answers each of `others` in turn."""
    clock = torch.zeros(1, dtype=torch.int64)
    found: list[tuple[int, int]] = [(0, 0)] if rank not in others else []
    for other in others if rank == 0 else [r for r in others if r == rank]:
        for _ in range(_ROUNDS):
            if rank == 0:
                dist.recv(clock, other, group=group)
                clock.fill_(time.monotonic_ns())
                dist.send(clock, other, group=group)
                continue
            asked = time.monotonic_ns()
            dist.send(clock, 0, group=group)
            dist.recv(clock, 0, group=group)
            answered = time.monotonic_ns()
            found.append((answered - asked, int(clock) - (asked + answered) // 2))
    return min(found)[1]
