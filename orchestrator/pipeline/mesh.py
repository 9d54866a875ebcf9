"""Who is who: rank to (stage, replica) and back. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """`replicas` pipelines of `stages` workers each.

    Consecutive ranks form a pipeline: launchers number the workers of a node consecutively, so a pipeline lies
    within a node where it can.
    """

    stages: int
    replicas: int

    @property
    def size(self) -> int:
        return self.stages * self.replicas

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, replica) of a rank."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is outside a mesh of {self.size}")
        replica, stage = divmod(rank, self.stages)
        return stage, replica

    def rank(self, stage: int, replica: int) -> int:
        return replica * self.stages + stage

    def before(self, rank: int) -> int | None:
        """The rank that feeds this one; None for the first stage."""
        return rank - 1 if self.place(rank)[0] > 0 else None

    def after(self, rank: int) -> int | None:
        """The rank that this one feeds; None for the last stage."""
        return rank + 1 if self.place(rank)[0] < self.stages - 1 else None
