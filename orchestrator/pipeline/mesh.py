"""Who is who: rank to (stage, replica) and back, and which samples of a batch are whose. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

# Buffers at each end of a link: one in use, the others under way.
SLOTS = 3


class Mesh:
    """Stages with a number of replicas each, `replicas[stage]`.

    Replica r of R has the samples from r / R to (r + 1) / R of every batch. Ranks are in order of where their
    samples begin, and of the stage: launchers number the workers of a node consecutively, so neighbours of a
    pipeline lie within a node where they can.
    """

    def __init__(self, replicas: Sequence[int]) -> None:
        self.replicas = tuple(replicas)

    @property
    def stages(self) -> int:
        return len(self.replicas)

    @property
    def size(self) -> int:
        return sum(self.replicas)

    @cached_property
    def _places(self) -> tuple[tuple[int, int], ...]:
        everyone = [(stage, replica) for stage, count in enumerate(self.replicas) for replica in range(count)]
        return tuple(sorted(everyone, key=lambda place: (place[1] / self.replicas[place[0]], place[0])))

    @cached_property
    def _ranks(self) -> dict[tuple[int, int], int]:
        return {place: rank for rank, place in enumerate(self._places)}

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, replica) of a rank."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is outside a mesh of {self.size}")
        return self._places[rank]

    def rank(self, stage: int, replica: int) -> int:
        return self._ranks[stage, replica]

    def stage_ranks(self, stage: int) -> list[int]:
        """The ranks that hold the same layers, in order of their samples."""
        return [self.rank(stage, replica) for replica in range(self.replicas[stage])]

    def before(self, rank: int) -> list[int]:
        """The ranks that feed this one, in order of their samples; none for the first stage."""
        return self._neighbours(rank, -1)

    def after(self, rank: int) -> list[int]:
        """The ranks that this one feeds, in order of their samples; none for the last stage."""
        return self._neighbours(rank, 1)

    def _neighbours(self, rank: int, step: int) -> list[int]:
        stage, replica = self.place(rank)
        other = stage + step
        if not 0 <= other < self.stages:
            return []
        own = self.replicas[stage]
        return [
            self.rank(other, r)
            for r in range(self.replicas[other])
            if r * own < (replica + 1) * self.replicas[other] and replica * self.replicas[other] < (r + 1) * own
        ]

    def limits(self, batch: int) -> list[int]:
        """The most samples that a worker of each stage gets of a batch of at most `batch`."""
        most = [-(-batch // self.replicas[0])]
        for stage in range(1, self.stages):
            shares = [
                sum(self.link_limit(before, rank, most[-1]) for before in self.before(rank))
                for rank in self.stage_ranks(stage)
            ]
            most.append(max(shares))
        return most

    def link_limit(self, source: int, target: int, samples: int) -> int:
        """The most samples that one rank sends to another when it has at most `samples`."""
        (stage, i), (_, j) = self.place(source), self.place(target)
        own, other = self.replicas[stage], self.replicas[stage + 1]
        # The share of [i / own, (i + 1) / own) that lies in [j / other, (j + 1) / other), times own * other.
        overlap = min((i + 1) * other, (j + 1) * own) - max(i * other, j * own)
        return -(-samples * overlap // other)


def cuts(samples: int, replica: int, replicas: int, others: int) -> list[int]:
    """Where `samples` in a row, the share of one of `replicas`, are cut for a neighbouring stage of `others`.

    Returns ascending borders from 0 to `samples`, one part for each neighbour that shares samples with this one.
    """
    inner = range(replica * others // replicas + 1, -(-(replica + 1) * others // replicas))
    return [0, *(samples * (border * replicas - replica * others) // others for border in inner), samples]
