"""Workers that torchrun started: rank 0 is the driver too, the others wait for its decision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from orchestrator.errors import JobError
from orchestrator.job.schema import Job
from orchestrator.launch.driver import run_job
from orchestrator.launch.signals import StopSignal
from orchestrator.launch.workers import local
from orchestrator.run.context import LocalContext
from orchestrator.run.worker import Assignment


def run_under_torchrun(job: Job, *, resume: str, summary_path: Path | None, origin: Path) -> None:
    """Take part in a run as the rank that torchrun gave this process."""
    placed = local.torchrun_rank()
    assert placed is not None
    rank, world_size, local_rank = placed
    local.refuse_missing_gpu(job)
    most = job.cluster.workers
    if not (job.cluster.min_workers or most) <= world_size <= most:
        raise JobError(
            f"cluster.workers: must be {world_size}, the number of processes that torchrun started, "
            f"got {most} (add --set cluster.workers={world_size})"
        )
    cluster = job.cluster.model_copy(update={"workers": world_size, "min_workers": None})
    job = job.model_copy(update={"cluster": cluster})
    values = job.model_dump(mode="json")
    os.environ.setdefault("OMP_NUM_THREADS", str(job.cluster.threads_per_worker))
    local.init_group(values, rank, world_size)
    try:
        if rank > 0:
            _follow(rank, world_size, local_rank)
            return
        lead = _Lead(LocalContext(0, world_size, local_rank))
        try:
            run_job(job, resume=resume, summary_path=summary_path, origin=origin, launch=lead)
        finally:
            if not lead.launched:
                dist.broadcast_object_list([None], src=0)
    finally:
        dist.destroy_process_group()


class _Lead:
    """Rank 0's way to launch: tell the others what was decided, then do its own share."""

    def __init__(self, context: LocalContext) -> None:
        self._context = context
        self.launched = False

    def __call__(self, assignment: Assignment) -> None:
        self.launched = True
        dist.broadcast_object_list([assignment], src=0)
        local.run_here(assignment, self._context)


def _follow(rank: int, world_size: int, local_rank: int) -> None:
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        return
    context = LocalContext(rank, world_size, local_rank)
    # torchrun signals every rank; rank 0 answers for all, this one passes it on.
    with StopSignal(lambda _: context.stop.__setitem__(0, True)):
        local.run_here(box[0], context)
