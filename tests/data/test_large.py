"""Sets of ImageNet's size and beyond: opened at once, read where a batch lies, memory flat over an epoch."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.data.images.mixing import Mix
from orchestrator.data.index import Shard, file_sha256, member_dtype, open_index, write_index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.stream import Batch, Indices, TrainStream
from orchestrator.data.packing.pack import pack
from tests.data.conftest import encoded, noise, write_tar

SHARDS, PER_SHARD = 10_000, 1000


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten million samples in ten thousand shards, which are names of one and the same file."""
    folder = tmp_path_factory.mktemp("huge")
    files = [(f"{i % 10}/{i:04d}.png", encoded(noise(i, 4, 4))) for i in range(PER_SHARD)]
    one = pack(write_tar(folder / "source.tar", files), folder / "one")
    (folder / "set").mkdir()
    file = one.folder / one.shards[0].name
    size, sha256 = file.stat().st_size, file_sha256(file)
    shards = [Shard(f"shard-{i:06d}.tar", size, sha256, PER_SHARD) for i in range(SHARDS)]
    for shard in shards:
        os.link(file, folder / "set" / shard.name)
    rows = np.tile(np.asarray(one.members, dtype=member_dtype(9)), SHARDS)
    rows["shard"] = np.repeat(np.arange(SHARDS), PER_SHARD)
    write_index(folder / "set", one.classes, shards, rows, "synthetic")
    return folder / "set"


def test_ten_million_samples_open_at_once(huge: Path) -> None:
    began = time.process_time()
    index = open_index(huge)
    assert time.process_time() - began < 0.3
    assert (index.num_samples, len(index.shards)) == (10_000_000, 10_000)


def test_the_first_batch_at_any_place_reads_its_own_members_only(huge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        read.append(length)
        return pread(descriptor, length, offset)

    tracemalloc.start()
    index = open_index(huge)
    source = ImageSource(index, image_size=4, channels=3)
    assert tracemalloc.get_traced_memory()[1] < 40e6, "a column of the table would be 80 MB"
    tracemalloc.stop()
    everything = np.arange(index.num_samples)
    settings = {"seed": 0, "lanes": 48, "window": 65536, "global_batch_size": 256}
    stream = TrainStream(source, everything, **settings, loader_threads=1, prefetch_batches=1)
    monkeypatch.setattr(os, "pread", counted)
    for step in (12_345, stream.steps_per_epoch - 1):
        read.clear()
        batches = stream.epoch(0, first_step=step)
        batch = next(batches)
        batches.close()
        lengths = index.members["length"][batch.indices].astype(int)
        assert len(batch.indices) >= 64
        assert sorted(read) == sorted((512 + lengths).tolist()), "header and image of each sample, nothing else"


class Nothing:
    """Batches without images: what is left is what the order and the stream take."""

    def batch(self, indices: Indices, epoch: int | None = None, mix: Mix | None = None) -> Batch:
        return Batch(torch.zeros(0), torch.zeros(0), indices, {})


def test_memory_is_flat_over_an_epoch_of_imagenet() -> None:
    everything = np.arange(1_281_167)
    settings = {"seed": 0, "lanes": 48, "window": 65536, "global_batch_size": 256}
    stream = TrainStream(Nothing(), everything, **settings)
    tracemalloc.start()
    try:
        sizes = []
        for epoch in range(2):
            for step, _ in enumerate(stream.epoch(epoch)):
                if step % 1000 == 10:
                    sizes.append(tracemalloc.get_traced_memory()[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(sizes) == 10
    assert max(sizes) - min(sizes) < 2**20, sizes
    assert peak < 100e6, peak
