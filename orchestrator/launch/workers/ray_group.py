"""A group of workers under Ray Train, as its controller and its workers read it.

Imports no torch: the controller needs none, and the workers wait for the controller.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.train import get_context
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.run.records.start import without_collector

if TYPE_CHECKING:
    from orchestrator.run.worker import Assignment

# How often a worker looks whether its node is about to be taken away.
_NOTICE_S = 2.0


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train without its actor for data sets: it is a process more, which takes seconds of a processor to start."""

    def __init__(self, assignment: Assignment, **configs: Any) -> None:
        # In bytes, since the controller reads all of its configuration.
        super().__init__(partial(_work, pickle.dumps(assignment)), backend_config=_Rendezvous(), **configs)

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, DatasetsCallback)]


class _Rendezvous(BackendConfig):  # type: ignore[misc]
    """Workers find the address of the first one in their environment, and make their group themselves."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _RendezvousBackend


class _RendezvousBackend(Backend):  # type: ignore[misc]
    # The workers of a node reach one another's GPUs directly.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        worker_group.execute(_remember, *worker_group.execute_single(0, _address))


def _address() -> tuple[str, int]:
    """This node, and a port of it that is free."""
    address = str(ray.util.get_node_ip_address())
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as s:
        s.bind(("", 0))
        return address, int(s.getsockname()[1])


def _remember(address: str, port: int) -> None:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def _work(packed: bytes) -> None:
    """What Ray Train calls in every worker."""
    with without_collector():
        import torch
        import torch.distributed as dist

        from orchestrator.launch.workers.local import init_group
        from orchestrator.run.worker import work

        assignment: Assignment = pickle.loads(packed)
    device, context = torch.device("cpu"), RayContext()
    if assignment.job["cluster"]["use_gpu"]:
        from ray.train.torch import get_device

        device = get_device()
        torch.cuda.set_device(device)  # before anything of NCCL
    init_group(assignment.job, context.rank, context.world_size)
    try:
        work(assignment, context, device)
    finally:
        dist.destroy_process_group()


class RayContext:
    """The loop's context inside a Ray Train worker."""

    def __init__(self) -> None:
        context = get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.local_rank: int = context.get_local_rank()
        self._node: str = ray.get_runtime_context().get_node_id()
        self._next_look = 0.0

    def report(self, metrics: dict[str, Any]) -> None:
        # Results travel through the run folder; Ray's own report would only copy them.
        return None

    def stop_requested(self) -> bool:
        # The driver's wish to stop arrives as a file in the run folder.
        return False

    def preemption(self) -> str | None:
        # Every worker looks: Ray counts local ranks by address, and nodes can share one.
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + _NOTICE_S
        with suppress(Exception):  # whatever the loss of the head looks like: the caller has more to do than this
            draining = draining_nodes()
            if self._node in draining:
                left_s = draining[self._node] / 1000 - time.time()
                when = f" in {left_s:.0f} s" if left_s > 0 else ""
                return f"the node of worker {self.rank} goes away{when}"
        return None


def draining_nodes() -> dict[str, int]:
    """Nodes that are about to be taken away, each with when, in milliseconds since 1970, 0 where nobody knows.

    Ray Train looks there too; what it offers to workers makes all of them wait for one another at every step.
    """
    from ray._private.state import state

    found: dict[str, int] = state.get_draining_nodes()
    return found
