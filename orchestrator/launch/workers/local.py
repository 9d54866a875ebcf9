"""Workers without Ray: this process alone, processes of this machine, or a group that torchrun started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.data.parallel import end_with_parent
from orchestrator.errors import JobError, OrchestratorError
from orchestrator.job.schema import Job
from orchestrator.launch.workers.environment import environment_of_workers
from orchestrator.run.context import LocalContext
from orchestrator.run.folder import RunFolder
from orchestrator.run.worker import Assignment, work, write_failure


class WorkerFailure(OrchestratorError):
    """A worker ended without a result; its own report, if it could write one, says why.

    `killed`: it was ended from outside, so it has none, and what the others report came of that.
    """

    def __init__(self, message: str, *, killed: bool = False) -> None:
        super().__init__(message)
        self.killed = killed


def refuse_missing_gpu(job: Job) -> None:
    """Raise JobError where a job wants GPUs that this machine has not."""
    if job.cluster.use_gpu and not torch.cuda.is_available():
        text = "must be false here, got true: this machine has no GPU that torch can use"
        raise JobError(findings=[("cluster.use_gpu", text)])


def device_of(job: dict[str, Any], local_rank: int) -> torch.device:
    """The device of a worker; local workers beyond the number of GPUs share them in turn."""
    if not job["cluster"]["use_gpu"]:
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def init_group(job: dict[str, Any], rank: int, world_size: int, port: int | None = None) -> None:
    """Join the other workers: by a store at a port of this machine, else as the environment says."""
    backend = "cpu:gloo,cuda:nccl" if job["cluster"]["use_gpu"] else "gloo"
    timeout = timedelta(seconds=job["cluster"]["timeout_s"])
    store = None if port is None else dist.TCPStore(_HERE, port, world_size, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def run_here(assignment: Assignment, context: LocalContext) -> None:
    """One worker in this very process. Raises WorkerFailure; its report in the run folder says why."""
    try:
        work(assignment, context, device_of(assignment.job, context.local_rank))
    except Exception as error:
        raise WorkerFailure(str(error)) from error


# --- processes of this machine


# One server imports what workers need and all of them are forked from it, those of later attempts too.
# macOS: its frameworks do not survive a fork.
_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
_HERE = "127.0.0.1"


def _child(rank: int, world_size: int, port: int, assignment: Assignment, environment: Mapping[str, str]) -> None:
    stop = [False]
    signal.signal(signal.SIGTERM, lambda *_: stop.__setitem__(0, True))
    end_with_parent()
    # The server has that of the time when it was started.
    os.environ.clear()
    os.environ.update(environment)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        init_group(assignment.job, rank, world_size, port)
    except Exception as error:
        write_failure(RunFolder(Path(assignment.run_dir)), assignment.attempt, rank, error)
        sys.exit(1)
    try:
        work(assignment, LocalContext(rank, world_size, rank, stop), device_of(assignment.job, rank))
    except Exception:
        # It has written down why; the driver tells it, first cause first.
        sys.exit(1)
    finally:
        dist.destroy_process_group()


def run_processes(assignment: Assignment) -> None:
    """Start one process per worker and wait; when one fails, the others are ended.

    Raises WorkerFailure naming the rank that ended first.
    """
    world_size = sum(assignment.replicas)
    # Here, not at rank 0: a port that is chosen before somebody listens may be taken meanwhile.
    store = dist.TCPStore(_HERE, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    context: Any = multiprocessing.get_context(_METHOD)
    context.set_forkserver_preload(["orchestrator.launch.workers.fork_server"])
    children: list[Any] = []
    try:
        with environment_of_workers(assignment.job["cluster"]):
            arguments = (world_size, store.port, assignment, dict(os.environ))
            for rank in range(world_size):
                child = context.Process(target=_child, args=(rank, *arguments), name=f"worker-{rank}")
                child.start()
                children.append(child)
        _wait(children)
    except (OSError, EOFError) as error:  # no more processes, or the server that forks them is gone
        raise WorkerFailure(f"worker {len(children)} could not be started: {error or type(error).__name__}") from error
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()


def _wait(children: list[Any]) -> None:
    while any(child.is_alive() for child in children):
        for rank, child in enumerate(children):
            child.join(0.05)
            if child.exitcode not in (None, 0):
                _grace(children)
                raise _first_cause(children, rank)
    for rank, child in enumerate(children):
        if child.exitcode != 0:
            raise _first_cause(children, rank)


def _first_cause(children: list[Any], rank: int) -> WorkerFailure:
    """A worker that was killed, or else `rank`, which was seen to have failed."""
    rank = next((r for r, child in enumerate(children) if (child.exitcode or 0) < 0), rank)
    exit_code = children[rank].exitcode
    return WorkerFailure(f"worker {rank} {_ending(exit_code)}", killed=exit_code < 0)


def _grace(children: list[Any], seconds: float = 3.0) -> None:
    """Let the others notice and write down what they saw."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(child.is_alive() for child in children):
        time.sleep(0.05)


def _ending(exit_code: int) -> str:
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = " (by hand, or by the system when memory ran out: train.micro_batches or a smaller batch need less)"
        return f"was ended by {name}{hint if name == 'SIGKILL' else ''}"
    return f"ended with exit code {exit_code}"


# --- torchrun


def torchrun_rank() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) when torchrun started this process, else None."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
