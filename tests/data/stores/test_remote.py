"""Shards in a bucket behind a bad network: what passes is tried again and counted, the rest ends in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.index import Index
from orchestrator.data.packing.pack import pack
from orchestrator.data.reader import ShardReader
from orchestrator.data.stores import remote
from orchestrator.data.stores.remote import Patience, Remote
from orchestrator.data.stores.remote_index import RemoteShards, open_data
from orchestrator.errors import DataError
from tests.conftest import Command
from tests.data.conftest import encoded, noise, write_tar
from tests.stores import BUCKET, Bucket, Door, Fault

HASTE = Patience(attempts=4, first_pause_s=0.01, longest_pause_s=0.02, connect_s=2.0, read_s=2.0, request_s=20.0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Twelve images of 200 kB in shards of two."""
    images = [(f"{label}/{i}.png", encoded(noise(10 * i + ord(label), 260, 256))) for label in "ab" for i in range(6)]
    folder = tmp_path_factory.mktemp("packed")
    return pack(write_tar(folder / "large.tar", images), folder / "large", shard_bytes=300_000)


@pytest.fixture
def stored(
    packed: Index, bucket: Bucket, before: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Index, Door]]:
    """Uploads the set and opens it through a door with these faults."""
    bucket.upload(packed.folder, tmp_path.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "Patience", lambda: HASTE)

    def opened(*faults: Fault) -> tuple[Index, Door]:
        before.faults[:] = faults
        return open_data(f"s3://{BUCKET}/{tmp_path.name}"), before

    return opened


def read_all(index: Index) -> list[tuple[str, str, bytes]]:
    reader = ShardReader(index)
    return [reader.read(i) for i in range(index.num_samples)]


def counted(index: Index) -> dict[str, float]:
    assert isinstance(index.store, RemoteShards)
    return index.store.counters.values()


def test_a_bucket_gives_what_the_folder_gives_and_asks_for_each_byte_once(packed: Index, stored: Callable) -> None:
    index, before = stored()
    assert index.sha256 == packed.sha256
    assert read_all(index) == read_all(packed)
    sizes = sum(s.bytes for s in index.shards) + sum(
        (packed.folder / name).stat().st_size for name in ("index.json", "members.npy")
    )
    counts = counted(index)
    assert counts["bytes"] == sizes
    assert (counts["misses"], counts["hits"]) == (len(index.shards), index.num_samples - len(index.shards))
    assert counts["wait_s"] > 0
    assert counts["retries"] == counts["damaged"] == 0
    again, _ = stored()
    assert read_all(again) == read_all(packed)
    assert counted(again)["bytes"] == (packed.folder / "index.json").stat().st_size
    assert len(before.asked) == len(index.shards) + 3


@pytest.mark.parametrize(
    "fault",
    [
        Fault(503, times=3),
        Fault(500),
        Fault(429),
        Fault("reset"),
        Fault("cut", after=0),
        Fault("stall", after=100_000),
        Fault(503, where="index.json"),
        Fault("cut", where="members.npy", after=200),
    ],
    ids=lambda f: f"{f.kind} {f.where}",
)
def test_what_passes_is_tried_again_and_counted(packed: Index, stored: Callable, fault: Fault) -> None:
    times = fault.times
    index, before = stored(fault)
    assert read_all(index) == read_all(packed)
    assert before.fired == {fault.kind: times}
    assert counted(index)["retries"] == times


def test_a_cut_transfer_goes_on_where_it_was_cut(packed: Index, stored: Callable) -> None:
    index, before = stored(Fault("cut", where="shard-000000", after=300_000))
    assert read_all(index) == read_all(packed)
    assert before.fired == {"cut": 1}
    first, second = (start for name, start in before.asked if name == "shard-000000.tar")
    assert first == 0 and 300_000 - 2**16 <= second <= 300_000  # a piece that was not whole is asked for again


def test_a_shard_that_was_damaged_on_the_way_is_fetched_again(packed: Index, stored: Callable) -> None:
    index, before = stored(Fault("flip", after=70_000))
    assert read_all(index) == read_all(packed)
    assert before.fired == {"flip": 1}
    assert counted(index)["damaged"] == 1


def test_a_shard_that_is_damaged_twice_is_an_error(stored: Callable) -> None:
    index, before = stored(Fault("flip", after=70_000, times=2))
    with pytest.raises(DataError, match=r"s3://.*/shard-000000\.tar: expected SHA-256 .*, found .*, twice; the file"):
        ShardReader(index).read(0)
    assert before.fired == {"flip": 2}


def test_bit_rot_in_the_copy_of_the_member_table_is_healed_by_the_next_try(stored: Callable, tmp_path: Path) -> None:
    stored()
    (copy,) = (tmp_path / "cache").rglob("members.npy")
    rotten = bytearray(copy.read_bytes())
    rotten[-1] ^= 1
    copy.write_bytes(rotten)
    with pytest.raises(DataError, match="the member table was changed"):
        stored()
    assert stored()[0].num_samples == 12


def test_bit_rot_in_the_cache_is_healed_from_the_store(packed: Index, stored: Callable) -> None:
    index, _ = stored()
    reader = ShardReader(index)
    reader.read(0)
    copy = index.shard_path(0)
    content = bytearray(copy.read_bytes())
    content[int(packed.members["offset"][0]) + 9] ^= 1
    copy.write_bytes(content)
    assert reader.read(0) == ShardReader(packed).read(0)
    copy.write_bytes(content[:5000])
    assert reader.read(0) == ShardReader(packed).read(0)
    assert counted(index)["damaged"] == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(404, times=9), r"s3://.*/shard-000000\.tar: there is no such file \(404\); upload the whole folder"),
        (Fault(403, times=9), r"s3://.*/shard-000000\.tar: reading is not allowed \(403\); set AWS_ACCESS_KEY_ID"),
        (Fault(401, times=9), r"s3://.*/shard-000000\.tar: reading is not allowed \(401\); set AWS_ACCESS_KEY_ID"),
        (Fault(400, times=9), r"s3://.*/shard-000000\.tar: the server refuses the request \(400\)"),
    ],
    ids=lambda v: str(v.kind) if isinstance(v, Fault) else "",
)
def test_what_does_not_pass_is_told_at_once_without_keys(stored: Callable, fault: Fault, message: str) -> None:
    index, before = stored(fault)
    with pytest.raises(DataError, match=message) as error:
        ShardReader(index).read(0)
    assert before.fired == {fault.kind: 1}
    assert error.value.exit_code == 3
    assert "AKIA" not in str(error.value)


@pytest.mark.parametrize(("kind", "reason"), [(503, "status 503"), ("reset", "the connection failed")])
def test_the_budget_of_tries_ends(stored: Callable, kind: str | int, reason: str) -> None:
    index, before = stored(Fault(kind, times=99))
    with pytest.raises(DataError, match=rf"shard-000000\.tar: given up after 4 tries in a row: {reason}; run the same"):
        ShardReader(index).read(0)
    assert before.fired == {kind: 4}


@pytest.mark.parametrize("enough", [50_000, 500_000])
def test_only_a_try_that_brought_a_good_part_is_none_too_many(
    packed: Index, stored: Callable, monkeypatch: pytest.MonkeyPatch, enough: int
) -> None:
    """Of a large file, a connection that breaks every now and then still brings all."""
    monkeypatch.setattr(remote, "_PROGRESS_BYTES", enough)
    index, before = stored(Fault("cut", where="shard-000000", after=70_000, times=5))
    if enough < 70_000:
        assert read_all(index) == read_all(packed)
        assert before.fired == {"cut": 5}
    else:
        with pytest.raises(DataError, match="given up after 4 tries in a row"):
            ShardReader(index).read(0)


def test_a_store_that_is_not_there_is_an_error(stored: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"index\.json: given up after 4 tries in a row: no connection"):
        stored()


def test_a_shard_of_another_size_is_told_before_it_is_fetched(
    packed: Index, stored: Callable, bucket: Bucket, tmp_path: Path
) -> None:
    index, _ = stored()
    bucket.put(f"{tmp_path.name}/shard-000000.tar", b"x" * 5000)
    with pytest.raises(DataError, match=rf"expected {packed.shards[0].bytes} bytes, found 5000; the file changed"):
        ShardReader(index).read(0)


def test_an_index_that_is_none_is_refused_with_its_url(stored: Callable, bucket: Bucket, tmp_path: Path) -> None:
    for content in (b"{", b"[]", b'{"members": {"bytes": 1}}', b'{"members": {"bytes": 1, "sha256": "../x"}}'):
        bucket.put(f"{tmp_path.name}/index.json", content)
        with pytest.raises(DataError, match=r"^s3://images/.*/index\.json: is not an index of this tool"):
            stored()


def test_a_changed_index_is_refused_with_its_url(
    packed: Index, stored: Callable, bucket: Bucket, tmp_path: Path
) -> None:
    text = (packed.folder / "index.json").read_text().replace('"a"', '"c"')
    bucket.put(f"{tmp_path.name}/index.json", text.encode())
    with pytest.raises(DataError, match=r"^s3://images/.*/index\.json: was changed after packing"):
        stored()


def test_https_servers_are_read_in_the_same_way(packed: Index, stored: Callable, tmp_path: Path) -> None:
    _, before = stored()
    index = open_data(f"http://127.0.0.1:{before.port}/{BUCKET}/{tmp_path.name}/")
    assert read_all(index) == read_all(packed)


@pytest.mark.parametrize("place", ["169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "[::ffff:169.254.169.254]"])
def test_link_local_addresses_are_refused(place: str) -> None:
    with pytest.raises(DataError, match="must not be a link-local address"):
        Remote(f"https://{place}/latest")


def test_a_name_that_points_to_a_link_local_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(2, 1, 6, "", ("169.254.169.254", 0))]
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *args: found)
    with pytest.raises(DataError, match=r"points to the link-local address 169\.254\.169\.254"):
        Remote("https://innocent.example/x").read("index.json", 10)


def test_verify_and_stats_take_a_url(stored: Callable, in_process: Command, bucket: Bucket, tmp_path: Path) -> None:
    index, _ = stored()
    url = f"s3://{BUCKET}/{tmp_path.name}"
    done = in_process("data", "verify", url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{url}: all hashes, keys and labels are right: 12 images")
    assert in_process("data", "stats", url).stdout.startswith(f"{url}: 12 images")
    content = bytearray(index.shard_path(1).read_bytes())
    index.shard_path(1).unlink()
    content[-1] ^= 1
    bucket.put(f"{tmp_path.name}/{index.shards[1].name}", bytes(content))
    done = in_process("data", "verify", url)
    assert done.returncode == 3
    assert f"{url}/{index.shards[1].name}: expected SHA-256" in done.stderr


def test_pauses_grow_are_random_and_have_a_limit() -> None:
    patience = Patience()
    pauses = np.array([[patience.pause_s(n) for n in range(1, 12)] for _ in range(200)])
    assert (pauses >= 0.1).all() and (pauses <= 15.0).all()
    assert pauses[:, 4].min() > pauses[:, 1].max()
    assert len(np.unique(pauses[:, 3])) > 100
