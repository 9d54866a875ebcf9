"""What the order needs in the next seconds is fetched before it is read, and no more than half of the cache."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.index import Index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.stream import TrainStream
from orchestrator.data.reader import ShardReader
from orchestrator.data.stores.prefetch import Horizon, Prefetcher, foreseen
from orchestrator.data.stores.remote_index import RemoteShards, open_data
from tests.data.conftest import forty_packed
from tests.stores import BUCKET, Bucket, Door, Fault, wait_until


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Forty small images, two in a shard."""
    return forty_packed(tmp_path_factory.mktemp("packed"), shard_bytes=5000)


@pytest.fixture
def far(packed: Index, bucket: Bucket, before: Door, tmp_path: Path) -> tuple[Index, Door]:
    bucket.upload(packed.folder, tmp_path.name)
    return open_data(f"s3://{BUCKET}/{tmp_path.name}", cache={"folder": str(tmp_path / "cache")}), before


def here(index: Index) -> set[int]:
    """The shards that are in the cache."""
    assert isinstance(index.store, RemoteShards)
    return {n for n, shard in enumerate(index.shards) if index.store.cache.path(shard).exists()}


def plan(index: Index) -> list[np.ndarray]:
    """Batches of one sample, each in a shard of its own."""
    return [np.array([np.flatnonzero(index.members["shard"] == n)[0]]) for n in range(len(index.shards))]


def test_the_horizon_is_a_time_at_the_rate_of_late() -> None:
    horizon = Horizon(30.0)
    assert horizon.batches(0.0) == 4
    for i in range(50):
        horizon.consumed(0.5 * i)
    assert horizon.batches(24.5) == 61
    assert horizon.batches(24.5 + 3600) == 4
    fast = Horizon(30.0)
    for i in range(50):
        fast.consumed(0.01 * i)
    assert fast.batches(0.49) == 3001


def test_shards_come_before_they_are_read_and_only_those_of_the_horizon(far: tuple[Index, Door]) -> None:
    index, _ = far
    assert len(index.shards) >= 12
    with Prefetcher(index, iter(plan(index)), seconds=0.0) as prefetcher:
        wait_until(lambda: here(index) == {0, 1, 2, 3})
        reader = ShardReader(index)
        reader.read(int(plan(index)[0][0]))
        prefetcher.advance()
        wait_until(lambda: here(index) == {0, 1, 2, 3, 4})
    assert index.store is not None
    assert isinstance(index.store, RemoteShards)
    assert (index.store.counters.values()["hits"], index.store.counters.values()["misses"]) == (1, 0)


def test_no_more_than_half_of_the_cache_is_fetched_early(
    packed: Index, far: tuple[Index, Door], tmp_path: Path
) -> None:
    bound = 4 * max(shard.bytes for shard in packed.shards)
    index = open_data(far[0].place, cache={"folder": str(tmp_path / "small"), "max_bytes": bound})
    prefetcher = Prefetcher(index, iter(plan(index)), seconds=1000.0)
    for _ in range(3):
        prefetcher.advance()  # a rate that asks for everything
    with prefetcher:
        wait_until(lambda: here(index) == {3, 4})
        time.sleep(0.3)
        assert here(index) == {3, 4}
        prefetcher.advance()
        wait_until(lambda: here(index) == {3, 4, 5})


def test_a_prefetcher_that_fell_behind_does_not_fetch_what_is_over(far: tuple[Index, Door]) -> None:
    index, _ = far
    prefetcher = Prefetcher(index, iter(plan(index)), seconds=0.0)
    for _ in range(6):
        prefetcher.advance()
    with prefetcher:
        wait_until(lambda: here(index) >= {6, 7, 8, 9})
    assert here(index) == {6, 7, 8, 9}


def test_a_shard_that_cannot_be_fetched_early_is_told_by_who_reads_it(far: tuple[Index, Door]) -> None:
    index, before = far
    before.faults.append(Fault(404, where="shard-000001", times=1))
    with Prefetcher(index, iter(plan(index)), threads=1, parts=False):
        wait_until(lambda: before.fired[404] and here(index) >= {0, 2, 3})
    assert ShardReader(index).read(int(plan(index)[1][0]))[0]


def test_a_stream_over_a_small_cache_gives_the_batches_of_the_folder(
    packed: Index, far: tuple[Index, Door], tmp_path: Path
) -> None:
    bound = 6 * max(shard.bytes for shard in packed.shards)
    index = open_data(far[0].place, cache={"folder": str(tmp_path / "small"), "max_bytes": bound})
    assert isinstance(index.store, RemoteShards)
    digests = []
    for one, foresee in ((packed, None), (index, lambda batches: foreseen(index, batches))):
        stream = TrainStream(
            ImageSource(one, image_size=8, channels=3, augment={"flip": True}),
            np.arange(one.num_samples),
            seed=3,
            lanes=4,
            window=16,
            global_batch_size=7,
            loader_threads=2,
            **({} if foresee is None else {"foresee": foresee}),
        )
        digest = hashlib.sha256()
        for batch in stream.steps(2, 2 * stream.steps_per_epoch + 1):
            digest.update(batch.images.numpy().tobytes() + batch.indices.tobytes())
            assert index.store.cache.used_bytes() <= bound
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1]
    assert index.store.counters.values()["bytes"] > sum(shard.bytes for shard in packed.shards)
