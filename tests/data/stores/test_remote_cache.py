"""The cache of a node: bounded, whole files only, shared by threads and processes, and none the worse for a SIGKILL."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.index import Shard
from orchestrator.data.stores.cache import ShardCache
from orchestrator.data.stores.remote import Remote, Stopped
from orchestrator.errors import DataError
from tests.conftest import ROOT, environment
from tests.stores import BUCKET, Bucket, Door, Fault, wait_until

SIZE = 400_000


@pytest.fixture
def shards(bucket: Bucket, tmp_path: Path) -> list[Shard]:
    """Six files of 400 kB in the bucket."""
    made = []
    for i in range(6):
        content = np.random.default_rng(i).bytes(SIZE)
        bucket.put(f"{tmp_path.name}/shard-{i}.tar", content)
        made.append(Shard(f"shard-{i}.tar", SIZE, hashlib.sha256(content).hexdigest(), 1))
    return made


@pytest.fixture
def far(before: Door, tmp_path: Path) -> tuple[Remote, Door]:
    return Remote(f"s3://{BUCKET}/{tmp_path.name}"), before


def names(cache: ShardCache) -> set[str]:
    return {file.name for file in cache.folder.iterdir() if not file.name.startswith(".")}


def whole(cache: ShardCache, shard: Shard) -> bool:
    return hashlib.sha256(cache.path(shard).read_bytes()).hexdigest() == shard.sha256


def test_what_was_used_longest_ago_makes_room(tmp_path: Path, shards: list[Shard], far: tuple[Remote, Door]) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE + 100)
    for i in (0, 1, 2):
        cache.fetch(far[0], shards[i])
        os.utime(cache.path(shards[i]), (i, i))
    assert cache.touch(shards[0])
    cache.fetch(far[0], shards[3])
    assert names(cache) == {cache.path(shards[i]).name for i in (0, 2, 3)}
    assert cache.used_bytes() == 3 * SIZE
    assert not cache.touch(shards[1])


def test_threads_and_caches_of_one_folder_fetch_each_shard_once_and_stay_within_the_bound(
    tmp_path: Path, shards: list[Shard], far: tuple[Remote, Door]
) -> None:
    caches = [ShardCache(tmp_path / "cache", 8 * SIZE) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(caches[n % 2].fetch, far[0], shards[n % 6]) for n in range(24)]
        assert all(job.result() for job in jobs)
    assert sorted(far[1].asked) == [(shard.name, 0) for shard in shards]
    assert all(whole(caches[0], shard) for shard in shards)
    assert not [name for name in names(caches[0]) if name.endswith(".part")]


def test_a_small_cache_never_holds_more_than_it_may_while_many_ask(
    tmp_path: Path, shards: list[Shard], far: tuple[Remote, Door]
) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            most[0] = max(most[0], cache.used_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(lambda n: cache.fetch(far[0], shards[n % 6]), range(12)))
    ended.set()
    watcher.join()
    assert SIZE <= most[0] <= 2 * SIZE


def test_making_room_for_one_shard_never_keeps_another_from_being_fetched(
    tmp_path: Path, shards: list[Shard], far: tuple[Remote, Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, probed = ShardCache(tmp_path / "cache", 8 * SIZE), threading.Event()

    def slowly(path: str) -> bool:
        with open(path, "rb") as part:
            fcntl.flock(part, fcntl.LOCK_EX)
            probed.set()
            time.sleep(0.2)
        return False

    monkeypatch.setattr("orchestrator.data.stores.cache._is_held", slowly)
    (cache.folder / f"{shards[0].sha256}-{SIZE}.part").touch()
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(cache.fetch, far[0], shards[1], wait=False)
        assert probed.wait(10)
        assert pool.submit(cache.fetch, far[0], shards[0], wait=False).result()
        assert other.result()


def test_a_killed_transfer_is_taken_up_where_it_was_cut(
    tmp_path: Path, shards: list[Shard], far: tuple[Remote, Door]
) -> None:
    remote, before = far
    before.faults.append(Fault("stall", after=300_000))
    code = (
        "import sys; from pathlib import Path; from orchestrator.data.stores.cache import ShardCache\n"
        "from orchestrator.data.index import Shard; from orchestrator.data.stores.remote import Remote\n"
        f"ShardCache(Path(sys.argv[1]), {4 * SIZE}).fetch(Remote(sys.argv[2]), {shards[0]!r})"
    )
    own = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "cache"), remote.url], cwd=ROOT, env=environment() | own
    )
    part = tmp_path / "cache" / f"{shards[0].sha256}-{SIZE}.part"
    try:
        wait_until(lambda: part.exists() and part.stat().st_size > 200_000, 60)
        cache = ShardCache(tmp_path / "cache", 4 * SIZE)
        assert not cache.fetch(remote, shards[0], wait=False), "it is in the hands of the other process"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    had = part.stat().st_size
    assert not cache.path(shards[0]).exists()
    assert cache.fetch(remote, shards[0])
    assert whole(cache, shards[0])
    assert before.fired == {"stall": 1}
    assert [start for _, start in before.asked] == [0, had]
    assert had > 200_000


def test_a_part_that_was_damaged_on_the_disk_is_fetched_from_its_first_byte(
    tmp_path: Path, shards: list[Shard], far: tuple[Remote, Door]
) -> None:
    cache = ShardCache(tmp_path / "cache", 4 * SIZE)
    (cache.folder / f"{shards[0].sha256}-{SIZE}.part").write_bytes(b"x" * 1000)
    assert cache.fetch(far[0], shards[0])
    assert whole(cache, shards[0])
    assert [start for _, start in far[1].asked] == [1000, 0]
    assert far[0].counters.values()["damaged"] == 1


def test_old_leftovers_are_removed_at_the_start_and_other_files_never(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    places = (f"{'a' * 64}-9.part", f"{'b' * 64}-9.part", "notes.part", f"{'c' * 64}.tar")
    old, young, other, whole = (folder / name for name in places)
    for file in (old, young, other, whole):
        file.write_bytes(b"x")
    for file in (old, other, whole):
        os.utime(file, (time.time() - 2 * 86400,) * 2)
    ShardCache(folder, 10)
    assert [file.exists() for file in (old, young, other, whole)] == [False, True, True, True]


def test_a_stop_ends_a_transfer_and_leaves_what_came(
    tmp_path: Path, shards: list[Shard], far: tuple[Remote, Door]
) -> None:
    cache, stop = ShardCache(tmp_path / "cache", 4 * SIZE), threading.Event()
    far[1].faults.append(Fault(503, times=99))
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(cache.fetch, far[0], shards[0], stop)
        wait_until(lambda: far[1].fired[503])
        stop.set()
        with pytest.raises(Stopped):
            job.result(timeout=10)
    assert names(cache) == set()


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"data\.cache\.folder: .*/file/cache: cannot be used: Not a directory"):
        ShardCache(tmp_path / "file" / "cache")


def test_without_a_bound_half_of_what_the_disk_has_left_is_taken(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert 0.3 * free < ShardCache(tmp_path / "cache").max_bytes < 0.7 * free
