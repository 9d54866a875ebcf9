"""Near batches are read in parts of shards that are not here, and every fault of that way ends in the way of shards."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.index import Index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.stream import TrainStream
from orchestrator.data.reader import ShardReader
from orchestrator.data.stores import spans
from orchestrator.data.stores.prefetch import Prefetcher, foreseen
from orchestrator.data.stores.remote_index import RemoteShards, open_data
from orchestrator.data.stores.spans import joined
from tests.data.conftest import digest, forty_packed
from tests.stores import BUCKET, Bucket, Door, Fault


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Forty images, ten in a shard."""
    return forty_packed(tmp_path_factory.mktemp("packed"), shard_bytes=40_000)


@pytest.fixture
def far(
    packed: Index, bucket: Bucket, before: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Index, Door]:
    """The same in a bucket; shards of any size are read in parts of some images."""
    monkeypatch.setattr(spans, "_LARGEST_BYTES", 12_000)
    monkeypatch.setattr(spans, "_GAP_BYTES", 2_000)
    bucket.upload(packed.folder, tmp_path.name)
    index = open_data(f"s3://{BUCKET}/{tmp_path.name}", cache={"folder": str(tmp_path / "cache")})
    before.asked.clear()
    return index, before


def store(index: Index) -> RemoteShards:
    assert isinstance(index.store, RemoteShards)
    return index.store


def here(index: Index) -> set[int]:
    """The shards that are in the cache."""
    return {n for n, shard in enumerate(index.shards) if store(index).cache.path(shard).exists()}


def parts_alone(index: Index, *batches: list[int]) -> Prefetcher:
    """A prefetcher that brings no shards."""
    return Prefetcher(index, iter([np.array(batch) for batch in batches]), threads=0)


def same(found: list[Any], packed: Index, batch: list[int]) -> bool:
    return found == [ShardReader(packed).read(i) for i in batch]


def test_neighbours_are_asked_for_together_and_small_gaps_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_GAP_BYTES", 10)
    monkeypatch.setattr(spans, "_LARGEST_BYTES", 100)
    assert joined([(0, 50, 60), (0, 0, 20), (0, 20, 30), (0, 0, 20)]) == [(0, 0, 30), (0, 50, 60)]
    assert joined([(0, 0, 20), (0, 30, 40), (0, 51, 60)]) == [(0, 0, 40), (0, 51, 60)]
    assert joined([(0, 0, 20), (1, 20, 30)]) == [(0, 0, 20), (1, 20, 30)]
    assert joined([(0, 0, 60), (0, 60, 100), (0, 100, 130)]) == [(0, 0, 100), (0, 100, 130)]
    assert joined([(0, 0, 500), (0, 100, 200)]) == [(0, 0, 500), (0, 100, 200)]


def test_a_near_batch_is_read_without_its_shards(packed: Index, far: tuple[Index, Door]) -> None:
    index, before = far
    assert len(index.shards) >= 3
    batch = [3, 17, 31, 4, 22]
    with parts_alone(index, batch):
        assert same(ShardReader(index).read_many(np.array(batch)), packed, batch)
    assert here(index) == set()
    assert 0 not in [start for _, start in before.asked]
    counts = store(index).counters.values()
    assert counts["misses"] == 5 and counts["wait_s"] > 0
    assert sum(packed.members["length"][batch]) < counts["bytes"] < sum(shard.bytes for shard in packed.shards) / 2


def test_a_batch_that_nobody_foresaw_is_read_in_parts_once_parts_are_read(
    packed: Index, far: tuple[Index, Door]
) -> None:
    index, before = far
    with parts_alone(index, [3]):
        assert same(ShardReader(index).read_many(np.array([3, 33])), packed, [3, 33])
        assert here(index) == set()
        asked = len(before.asked)
        assert same(ShardReader(index).read_many(np.array([33])), packed, [33])
        assert len(before.asked) == asked, "a part is asked for once"


def test_without_anybody_who_foresees_and_from_small_shards_whole_shards_are_read(
    packed: Index, far: tuple[Index, Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, _ = far
    assert same(ShardReader(index).read_many(np.array([3])), packed, [3])
    assert here(index) == {0}
    monkeypatch.setattr(spans, "_LARGEST_BYTES", 10**6)
    with parts_alone(index, [33]):
        assert same(ShardReader(index).read_many(np.array([33])), packed, [33])
    assert here(index) == {0, int(packed.members["shard"][33])}


@pytest.mark.parametrize(
    "fault", [Fault(503), Fault(404), Fault("reset"), Fault("cut", after=700), Fault("flip", after=700)], ids=str
)
def test_a_part_that_fails_is_read_with_its_shard(packed: Index, far: tuple[Index, Door], fault: Fault) -> None:
    index, before = far
    before.faults.append(Fault(fault.kind, after=fault.after))
    with parts_alone(index, [3, 4]):
        assert same(ShardReader(index).read_many(np.array([3, 4])), packed, [3, 4])
    assert before.fired == {fault.kind: 1}
    assert here(index) == {0}


def test_what_parts_cost_has_a_bound(packed: Index, far: tuple[Index, Door], monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = far
    size = int(packed.members["length"].max()) + 512
    monkeypatch.setattr(spans, "_FREE_BYTES", size)
    with parts_alone(index, [3], [33]):
        reader = ShardReader(index)
        assert same(reader.read_many(np.array([3])), packed, [3])
        assert here(index) == set()
        assert same(reader.read_many(np.array([33])), packed, [33])
    assert here(index) == {int(packed.members["shard"][33])}, "the second would have cost too much"


def test_memory_for_parts_has_a_bound(packed: Index, far: tuple[Index, Door], monkeypatch: pytest.MonkeyPatch) -> None:
    index, before = far
    monkeypatch.setattr(spans, "_MEMORY_BYTES", 3 * (int(packed.members["length"].max()) + 512))
    order = [3, 33, 13, 23, 8, 38]
    with parts_alone(index, [3]):
        reader = ShardReader(index)
        for i in order:
            assert same(reader.read_many(np.array([i])), packed, [i])
        asked = len(before.asked)
        assert same(reader.read_many(np.array([38])), packed, [38])
        assert len(before.asked) == asked
        assert same(reader.read_many(np.array([3])), packed, [3])
        assert len(before.asked) == asked + 1, "the oldest part is gone"


def test_parts_of_a_shard_that_has_come_are_forgotten(packed: Index, far: tuple[Index, Door]) -> None:
    index, before = far
    with parts_alone(index, [3]):
        store(index).path(0)
        asked = len(before.asked)
        assert same(ShardReader(index).read_many(np.array([3, 5])), packed, [3, 5])
        assert len(before.asked) == asked
        found = store(index).spans
        assert found is not None and found.take((0, 512, 600)) is None


def test_a_stream_in_parts_gives_the_batches_of_the_folder(
    packed: Index, far: tuple[Index, Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, before = far
    before.faults += [Fault(503, times=3), Fault("flip", after=900)]
    monkeypatch.setattr(spans, "_FREE_BYTES", 60_000)
    digests = []
    for one in (packed, index):
        stream = TrainStream(
            ImageSource(one, image_size=8, channels=3, augment={"flip": True}),
            np.arange(one.num_samples),
            seed=3,
            lanes=4,
            window=16,
            global_batch_size=7,
            loader_threads=2,
            foresee=partial(foreseen, one),
        )
        digests.append(digest(stream.epoch(0)))
    assert digests[0] == digests[1]
    assert any(start not in (0,) for _, start in before.asked), "parts were read"
