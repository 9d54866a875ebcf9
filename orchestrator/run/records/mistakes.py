"""The images that a network is most sure of and wrong about: found while it classifies, shown on the run's page."""

from __future__ import annotations

import base64
import heapq
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orchestrator.data.describe import thumbnail
from orchestrator.data.index import Index
from orchestrator.data.names import source_names
from orchestrator.data.reader import ShardReader
from orchestrator.data.stores.remote_index import RemoteShards
from orchestrator.errors import DataError

SHOWN = 24


@dataclass(frozen=True, order=True)
class Mistake:
    """Sample `position` of a set, of class `target`, called `predicted` with that probability."""

    probability: float
    position: int
    target: int
    predicted: int


@dataclass
class MistakesOfPart:
    """Those of one replica, which has its part of every batch; `sizes` are those of its parts."""

    most: int
    sizes: list[int] = field(default_factory=list)
    # (probability, batch, offset in the part, target, predicted)
    found: list[tuple[float, int, int, int, int]] = field(default_factory=list)

    def add(self, vote_BC: Tensor, target_B: Tensor) -> None:
        """Look at the next batch; an empty part counts as one too."""
        batch = len(self.sizes)
        self.sizes.append(len(target_B))
        probability_B, predicted_B = torch.softmax(vote_BC.float(), dim=1).max(dim=1)
        wrong = (predicted_B != target_B).nonzero()[:, 0]
        surest = wrong[probability_B[wrong].topk(min(self.most, len(wrong))).indices]
        columns = (probability_B[surest], surest, target_B[surest], predicted_B[surest])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        self.found = heapq.nlargest(self.most, [*self.found, *((p, batch, i, t, k) for p, i, t, k in rows)])


def together(parts: Sequence[MistakesOfPart]) -> list[Mistake]:
    """The surest mistakes of all replicas, these in order of their samples; the surest first."""
    if not parts:
        return []
    found, start = [], 0
    for batch in range(len(parts[0].sizes)):
        for part in parts:
            found += [Mistake(p, start + i, t, k) for p, at, i, t, k in part.found if at == batch]
            start += part.sizes[batch]
    return heapq.nlargest(parts[0].most, found)


def described(mistakes: Sequence[Mistake], index: Index, subset: Any) -> list[dict[str, Any]]:
    """Plain values for the page: key, names of the classes, probability, a small JPEG as base64.

    `name` is that of the file in the source of the data, None where it is not known. `subset` are the samples of
    `index` that the positions count. There is no image where the shards are far away, since what showed them may have
    come from cached features.
    """
    reader = None if isinstance(index.store, RemoteShards) else ShardReader(index)
    names = [index.class_names.get(name, name) for name in index.classes]
    samples = [int(subset[mistake.position]) for mistake in mistakes]
    keys = index.keys(samples)
    files = source_names(index, keys)
    shown = []
    for mistake, sample, key in zip(mistakes, samples, keys, strict=True):
        shown.append(
            {
                "key": key,
                "name": files.get(key),
                "target": names[mistake.target],
                "predicted": names[mistake.predicted],
                "probability": mistake.probability,
                "jpeg": None if reader is None else _jpeg(reader, sample),
            }
        )
    return shown


def _jpeg(reader: ShardReader, sample: int) -> str | None:
    # A run does not fail in its last second for a picture on its page.
    with suppress(OSError, DataError):
        image = thumbnail(reader, sample)
        return None if image is None else base64.b64encode(image).decode()
    return None
