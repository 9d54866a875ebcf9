"""What the training loop needs to know of its launcher: nothing of Ray, torchrun or processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist


class Context(Protocol):
    """Rank, size and the wish to stop; every launcher gives one of these to the loop."""

    rank: int
    world_size: int
    local_rank: int

    def report(self, metrics: dict[str, Any]) -> None:
        """Tell the launcher of finished epochs (never called per step)."""

    def stop_requested(self) -> bool:
        """Whether this worker was asked to save and leave, by a signal."""

    def preemption(self) -> str | None:
        """That this worker's node is about to be taken away, in words; not called by the training thread."""


@dataclass
class LocalContext:
    """One process of a group that somebody else set up, or the only one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    stop: list[bool] = field(default_factory=lambda: [False])

    def report(self, metrics: dict[str, Any]) -> None:
        return None

    def stop_requested(self) -> bool:
        return self.stop[0]

    def preemption(self) -> str | None:
        return None


class Control:
    """Small objects between all workers, over gloo, away from the activations.

    A call raises RuntimeError when a worker does not take part for `timeout_s` seconds.
    """

    def __init__(self, world_size: int, timeout_s: float = 300.0) -> None:
        self.world_size = world_size
        self.group: dist.ProcessGroup | None = None
        if world_size > 1:
            # Without a time-out of its own torch gives each new group half an hour, whatever the first one has.
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            assert isinstance(group, dist.ProcessGroup)
            self.group = group

    def gather(self, mine: Any) -> list[Any]:
        """Every worker's object, by rank, on every worker. Also a barrier."""
        if self.world_size == 1:
            return [mine]
        everything: list[Any] = [None] * self.world_size
        dist.all_gather_object(everything, mine, group=self.group)
        return everything

    def broadcast(self, mine: Any) -> Any:
        """Rank 0's object on every worker."""
        if self.world_size == 1:
            return mine
        box = [mine]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]
