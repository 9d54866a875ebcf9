"""Every way in which a sample can be wrong ends in one message with shard, key, expected and found."""

from __future__ import annotations

import dataclasses
import re
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from orchestrator.data import reader
from orchestrator.data.index import Index
from orchestrator.data.reader import ShardReader
from orchestrator.errors import DataError


def with_row(index: Index, i: int, **columns: int) -> Index:
    """The index with one row of its member table changed, as a table too large for hashing may be."""
    members = np.array(index.members)
    for name, value in columns.items():
        members[name][i] = value
    return dataclasses.replace(index, members=members)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"shard": 77}, "key 000000002: its row in the member table is damaged (shard 77"),
        ({"offset": 3}, "key 000000002: its row in the member table is damaged"),
        ({"suffix": 9}, "key 000000002: its row in the member table is damaged"),
        ({"label": 2}, "key 000000002: member .cls: label 2 is outside of 2 classes"),
        ({"crc32": 1}, "key 000000002: member .png: expected CRC32 00000001, found"),
        ({"length": 10}, "key 000000002: member .png: expected CRC32"),
        ({"length": 10**7}, "key 000000002: expected 10000000 bytes at"),
        ({"offset": 2**40}, "found 0"),
        ({"suffix": 0}, "key 000000002: the header of member .jpg is damaged (found name '000000002.png')"),
    ],
)
def test_a_wrong_row_is_named(small: Index, columns: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        ShardReader(with_row(small, 2, **columns)).read(2)


def test_many_samples_are_read_as_one_after_the_other(small: Index) -> None:
    order = [7, 0, 11, 3, 3, 8]
    reader = ShardReader(small)
    assert reader.read_many(np.array(order)) == [reader.read(i) for i in order]
    assert reader.read_many(np.array([], dtype=np.int64)) == []
    with pytest.raises(DataError, match=r"key 000000002: member \.png: expected CRC32 00000001"):
        ShardReader(with_row(small, 2, crc32=1)).read_many(np.arange(12))


def test_two_members_that_changed_places_are_noticed(small: Index) -> None:
    first, second = (small.members[i] for i in np.flatnonzero(small.members["shard"] == 0)[:2])
    columns = {name: int(second[name]) for name in ("offset", "length", "crc32")}
    swapped = with_row(small, 0, **columns)
    assert first["key"] == b"000000000"
    with pytest.raises(DataError, match=r"key 000000000: the header .* is damaged \(found name '000000001"):
        ShardReader(swapped).read(0)


def test_every_byte_of_a_header_is_checked(small: Index) -> None:
    shard = small.folder / small.shards[0].name
    whole = shard.read_bytes()
    start = int(small.members["offset"][0]) - 512
    for at in range(start, start + 512):
        damaged = bytearray(whole)
        damaged[at] ^= 16
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=r"key 000000000: the header of member \.png is damaged"):
            ShardReader(small).read(0)


def test_a_missing_shard_is_named(small: Index) -> None:
    (small.folder / small.shards[0].name).unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar: the shard cannot be opened: No such file"):
        ShardReader(small).read(0)


def test_threads_read_right_while_others_push_their_shards_out(small: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_OPEN_SHARDS", 1)
    shared = ShardReader(small)
    start = threading.Barrier(4)

    def work(seed: int) -> int:
        start.wait()
        chosen = np.random.default_rng(seed).integers(0, small.num_samples, 500).tolist()
        return sum(zlib.crc32(shared.read(i)[2]) == small.members["crc32"][i] for i in chosen)

    assert len(small.shards) > 1
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [500] * 4
