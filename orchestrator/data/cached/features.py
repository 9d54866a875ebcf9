"""Cached features: WebDataset shards whose samples all take the same number of bytes.

A sample is a `.npy` member of one vector and a `.cls` member, under the key of its image. Because every sample has
one size, a shard maps into memory as a strided array and a batch is a gather.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.images.mixing import Mix
from orchestrator.data.index import FEATURES, Index, open_index
from orchestrator.data.loading.stream import Batch, Indices
from orchestrator.data.quarantine import Quarantined
from orchestrator.data.reader import ShardReader
from orchestrator.errors import DataError

_BLOCK = 512
_SHARD_BYTES = 64 * 2**20
# Enough shards to share among workers, but none of a few samples.
_SHARDS, _LEAST_SAMPLES = 16, 256

Vectors = NDArray[np.float16] | NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Where the vectors of a shard lie: `width` numbers of `dtype` (float16 or float32) per sample."""

    width: int
    dtype: str

    @cached_property
    def head(self) -> bytes:
        """What numpy writes before the numbers of such a vector."""
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(self.width, dtype=self.dtype))
        return buffer.getvalue()[: -self.width * self.item_bytes]

    @property
    def item_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def member_bytes(self) -> int:
        """Bytes of a `.npy` member."""
        return len(self.head) + self.width * self.item_bytes

    @property
    def stride(self) -> int:
        """Bytes from one sample to the next: two tar headers, the padded vector, a block for the class."""
        return 3 * _BLOCK + -(-self.member_bytes // _BLOCK) * _BLOCK

    def member_offsets(self, samples: int) -> NDArray[np.int64]:
        """Where the `.npy` members of a shard begin."""
        return _BLOCK + self.stride * np.arange(samples, dtype=np.int64)

    def vectors(self, shard: Path, samples: int) -> Vectors:
        """The vectors of a shard, (samples, width), mapped into memory and read only."""
        mapped = np.memmap(shard, dtype=np.uint8, mode="r")
        return np.ndarray(
            (samples, self.width),
            dtype=self.dtype,
            buffer=mapped,
            offset=_BLOCK + len(self.head),
            strides=(self.stride, self.item_bytes),
        )

    def shard_samples(self, samples: int) -> int:
        """Samples per shard of a set, a function of its size alone: about 64 MB, less for small sets."""
        wanted = max(_LEAST_SAMPLES, -(-samples // _SHARDS))
        return max(1, min(wanted, _SHARD_BYTES // self.stride))


class FeatureSet:
    """One vector per sample of a source index, in its order. Raises DataError for a folder that is not whole.

    A vector's key and CRC32 are checked when it is read for the first time, then it is read at memory speed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.index: Index = open_index(folder, FEATURES)
        extra = self.index.extra
        try:
            self.parts: tuple[int, ...] = tuple(extra["parts"])
            self.layout = Layout(sum(self.parts), extra["dtype"])
            self.source_sha256: str = extra["source_sha256"]
            self.bad: dict[int, str] = {int(i): _fault(text) for i, text in extra["bad"].items()}
        except KeyError as error:
            raise DataError(f"{folder}: its index.json says nothing of {error}, which features need") from None
        self._refuse_other_layout()
        self._reader = ShardReader(self.index)
        self._shard_of = self.index.members["shard"].astype(np.int64)
        sizes = [shard.samples for shard in self.index.shards]
        self._starts = np.cumsum([0, *sizes])
        self._checked = np.zeros(self.index.num_samples, dtype=bool)
        self._mapped: dict[int, Vectors] = {}
        self._lock = threading.Lock()

    def _refuse_other_layout(self) -> None:
        members, start = self.index.members, 0
        for number, shard in enumerate(self.index.shards):
            rows = members[start : start + shard.samples]
            right = (
                (rows["shard"] == number).all()
                and np.array_equal(rows["offset"], self.layout.member_offsets(shard.samples))
                and (rows["length"] == self.layout.member_bytes).all()
                and shard.bytes >= shard.samples * self.layout.stride
            )
            if not right:
                raise DataError(f"{self.index.folder / shard.name}: its members do not lie as those of features do")
            size = (self.index.folder / shard.name).stat().st_size if (self.index.folder / shard.name).exists() else 0
            if size != shard.bytes:
                raise DataError(f"{self.index.folder / shard.name}: expected {shard.bytes} bytes, found {size}")
            start += shard.samples

    def gather(self, indices: Indices) -> Vectors:
        """A copy of the vectors of chosen samples, (B, width)."""
        self._check(indices)
        result: Vectors = np.empty((len(indices), self.layout.width), dtype=self.layout.dtype)
        shards = self._shard_of[indices]
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            result[here] = self._vectors(int(shard))[indices[here] - self._starts[shard]]
        return result

    def _vectors(self, shard: int) -> Vectors:
        with self._lock:
            if shard not in self._mapped:
                path = self.index.folder / self.index.shards[shard].name
                self._mapped[shard] = self.layout.vectors(path, self.index.shards[shard].samples)
            return self._mapped[shard]

    def _check(self, indices: Indices) -> None:
        for i in indices[~self._checked[indices]].tolist():
            try:
                key, _, payload = self._reader.read(i)
            except DataError as error:
                raise DataError(f"{error}; remove {self.index.folder}: the features are made again") from None
            if not payload.startswith(self.layout.head):
                raise DataError(f"{self._reader.path(i)}: key {key}: is not a {self.layout.dtype} vector")
            self._checked[i] = True


def _fault(text: str) -> str:
    """Why there are no features of an image; one that was in quarantine beforehand uses up no budget here either."""
    return Quarantined(text) if text.startswith(Quarantined.reason) else text


@dataclass(frozen=True)
class FeatureFolders:
    """Where a run finds its features, as plain values: a folder per view of the training images, and the folders of
    images without augmentation by the SHA-256 of their index. For each unit of the trunk `parts` tells how many
    numbers it sees and `trunk` the hash of its frozen weights."""

    parts: tuple[int, ...]
    trunk: tuple[str, ...]
    views: tuple[str, ...]
    plain: dict[str, str]


class FeatureSource:
    """Batches of cached features; epoch e trains on view e modulo the number of `views`, evaluation on the first."""

    def __init__(self, views: Sequence[FeatureSet], labels: Indices | None = None) -> None:
        self._views = views
        self._labels = views[0].index.labels if labels is None else labels
        if len({(view.parts, view.source_sha256) for view in views}) != 1:
            raise ValueError("the views of a source have the same parts and the same images")

    @property
    def decoder(self) -> str:
        """Nothing is decoded."""
        return "none (cached features)"

    def batch(self, indices: Indices, epoch: int | None = None, mix: Mix | None = None) -> Batch:
        """Features (B, D) of the chosen samples; those whose image could not be decoded are left out."""
        assert mix is None, "what a frozen trunk makes of a mixed image is no mixture of features"
        view = self._views[(epoch or 0) % len(self._views)]
        skipped = {i: view.bad[i] for i in indices.tolist() if i in view.bad} if view.bad else {}
        if skipped:
            indices = indices[[i not in skipped for i in indices.tolist()]]
        features: Tensor = torch.from_numpy(view.gather(indices))
        return Batch(features, torch.from_numpy(self._labels[indices]), indices, skipped)
