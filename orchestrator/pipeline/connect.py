"""Where workers are, by which way two of them are joined, and the links of a worker to its neighbours."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from orchestrator.errors import JobError
from orchestrator.pipeline import nccl, p2p, shm
from orchestrator.pipeline.fan import FanIn, FanOut
from orchestrator.pipeline.links import LinkShape, Receiver, Sender
from orchestrator.pipeline.mesh import Mesh

Transport = Literal["shm", "gloo", "nccl"]
_STATED: dict[str, Transport] = {"shm": "shm", "gloo": "gloo", "nccl": "nccl"}


@dataclass(frozen=True)
class Place:
    """Where a worker computes: a host and, not on a CPU, one GPU of it."""

    host: str
    gpu: str | None = None


def host_id() -> str:
    """The same on all processes of one running machine, and on no other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}"


def all_places(device: torch.device, group: dist.ProcessGroup | None = None) -> list[Place]:
    """The place of every worker, by rank; every rank calls this with its device."""
    # By its UUID: processes that see different GPUs count them differently.
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    everyone: list[Place] = [Place("")] * dist.get_world_size(group)
    dist.all_gather_object(everyone, Place(host_id(), gpu), group=group)
    return everyone


def refuse_shared_gpus(mesh: Mesh, places: Sequence[Place]) -> None:
    """Raise JobError for replicas of a stage on one GPU: NCCL, which sums their gradients, joins different ones."""
    for stage in range(mesh.stages):
        taken: dict[Place, int] = {}
        for rank in mesh.stage_ranks(stage):
            other = taken.setdefault(places[rank], rank)
            if other != rank and places[rank].gpu is not None:
                gpus, s = len(set(places)), "s" if len(set(places)) > 1 else ""
                raise JobError(
                    f"cluster.workers: {mesh.size} workers have {gpus} GPU{s}, and two replicas of stage {stage} "
                    f"(ranks {other} and {rank}) share one, which NCCL does not allow; use at most {gpus} worker{s}, "
                    f"or stages without replicas (cluster.stages: {mesh.size})"
                )


def choose_transport(wanted: str, a: Place, b: Place, *, linux: bool, crowded: bool) -> Transport:
    """How two workers are joined: between CPUs of one Linux host by shm, else by gloo; between GPUs by nccl.

    `crowded`: some workers share a GPU. NCCL refuses two ranks on one, so everything goes through memory of the
    hosts then, and with shm or gloo as a wish. Raises JobError for a wish that cannot be.
    """
    near = a.host == b.host and linux
    if wanted == "shm" and not near:
        raise JobError("cluster.transport: shm joins workers of one Linux host only; use auto")
    if wanted == "nccl" and crowded:
        raise JobError("cluster.transport: nccl cannot join workers that share a GPU; use auto, or as many GPUs")
    if wanted in _STATED:
        return _STATED[wanted]
    if a.gpu is not None and not crowded:
        return "nccl"
    return "shm" if near else "gloo"


@dataclass(frozen=True)
class _Ways:
    """How every pair of workers is joined, and what their link carries."""

    mesh: Mesh
    places: Sequence[Place]
    wanted: str
    device: torch.device

    def by(self, source: int, target: int) -> Transport:
        crowded = self.device.type == "cuda" and len(set(self.places)) < len(self.places)
        ends = self.places[source], self.places[target]
        return choose_transport(self.wanted, *ends, linux=sys.platform == "linux", crowded=crowded)

    def carried(self, whole: LinkShape, source: int, target: int) -> LinkShape:
        """The part of a batch that goes over one link; in shared memory nothing is rounded."""
        most = self.mesh.limits(whole.max_batch)[self.mesh.place(source)[0]]
        wire = None if self.by(source, target) == "shm" else whole.wire
        return replace(whole, max_batch=self.mesh.link_limit(source, target, most), wire=wire)


def open_links(
    mesh: Mesh,
    rank: int,
    incoming: LinkShape | None,
    outgoing: LinkShape | None,
    *,
    transport: str,
    timeout_s: float,
    token: str,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> tuple[Receiver | None, Sender | None]:
    """Connect a worker to its neighbours. Every rank calls this; `token` is unique to the attempt.

    `incoming` and `outgoing` are None at the first and the last stage; their `max_batch` is that of the whole batch,
    of which every link carries its part. In shared memory nothing is rounded to `wire`. Raises JobError for a
    `transport` that cannot be, LinkError for a neighbour that does not connect.
    """
    where = device or torch.device("cpu")
    ways = _Ways(mesh, all_places(where, group), transport, where)
    before = mesh.before(rank) if incoming is not None else []
    after = mesh.after(rank) if outgoing is not None else []
    # All listen before anybody connects.
    listeners = {source: shm.listen(token, source, rank) for source in before if ways.by(source, rank) == "shm"}
    # In one order of all links, or two workers would wait for each other.
    for link in sorted([(source, rank) for source in before] + [(rank, target) for target in after]):
        if ways.by(*link) == "nccl":
            nccl.meet(*link, where)
    senders: list[Sender] = []
    for target in after:
        assert outgoing is not None
        shape, by = ways.carried(outgoing, rank, target), ways.by(rank, target)
        if by == "shm":
            senders.append(shm.ShmSender(shape, token, rank, target, timeout_s))
        elif by == "gloo":
            senders.append(p2p.P2PSender(shape, target, timeout_s))
        else:
            senders.append(nccl.NcclSender(shape, target, timeout_s, where))
    receivers: list[Receiver] = []
    for source in before:
        assert incoming is not None
        shape, by = ways.carried(incoming, source, rank), ways.by(source, rank)
        if by == "shm":
            receivers.append(shm.ShmReceiver(shape, listeners[source], source, timeout_s))
        elif by == "gloo":
            receivers.append(p2p.P2PReceiver(shape, source, timeout_s))
        else:
            receivers.append(nccl.NcclReceiver(shape, source, timeout_s, where))
    return _joined(receivers), _parted(senders, mesh, rank)


def _joined(receivers: Sequence[Receiver]) -> Receiver | None:
    """One receiver for those from all replicas of the stage before."""
    return FanIn(receivers) if len(receivers) > 1 else next(iter(receivers), None)


def _parted(senders: Sequence[Sender], mesh: Mesh, rank: int) -> Sender | None:
    """One sender for those to all replicas of the stage behind."""
    if len(senders) < 2:
        return next(iter(senders), None)
    stage, replica = mesh.place(rank)
    return FanOut(senders, replica, mesh.replicas[stage], mesh.replicas[stage + 1])
