"""Open a data set wherever it lies: a folder, or a URL whose index is copied here and whose shards come on demand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.data.index import IMAGES, MEMBERS, Index, Kind, Shard, file_sha256, open_index
from orchestrator.data.stores.cache import ShardCache, open_cache
from orchestrator.data.stores.remote import Remote
from orchestrator.data.stores.spans import Spans, Wanted
from orchestrator.errors import DataError
from orchestrator.job import paths
from orchestrator.storage import write_atomically

_LARGEST_INDEX = 256 * 2**20
_UNBOUNDED = 2**62


class RemoteShards:
    """The shards of one remote data set, read through the cache of this node."""

    def __init__(self, remote: Remote, cache: ShardCache, shards: tuple[Shard, ...]) -> None:
        self.url = remote.url
        self.remote, self.cache, self.shards = remote, cache, shards
        self.counters = remote.counters
        self.spans: Spans | None = None

    def path(self, shard: int) -> Path:
        """Where the copy of a shard is, fetched if need be. Raises DataError."""
        self.cache.fetch(self.remote, self.shards[shard])
        return self.cache.path(self.shards[shard])

    def open(self, shard: int) -> int:
        """A descriptor of the copy of a shard, fetched if need be. Raises DataError."""
        wanted = self.shards[shard]
        with suppress(FileNotFoundError):
            descriptor = os.open(self.cache.path(wanted), os.O_RDONLY)
            self.cache.touch(wanted)
            self.counters.add(hits=1)
            return descriptor
        began = time.perf_counter()
        try:
            while True:
                with suppress(FileNotFoundError):  # what has just come may have made room again
                    return os.open(self.path(shard), os.O_RDONLY)
        finally:
            self.counters.add(misses=1, wait_s=time.perf_counter() - began)

    def early(self, wanted: Sequence[Wanted]) -> list[bytes | None]:
        """Parts of shards that are not here yet, as far as they can be had before them; None: open the shard."""
        spans = self.spans
        if spans is None:
            return []
        missing = {shard for shard in {shard for shard, _, _ in wanted} if not self._is_here(shard)}
        if not missing:
            return []
        began = time.perf_counter()
        spans.ask(one for one in wanted if one[0] in missing)
        found = [spans.take(one) if one[0] in missing else None for one in wanted]
        self.counters.add(misses=sum(part is not None for part in found), wait_s=time.perf_counter() - began)
        return found

    def ask_early(self, wanted: Iterable[Wanted]) -> None:
        """Begin to fetch parts of shards, for `early`; from the first call on it reads parts."""
        self.spans = self.spans or Spans(self.remote, self.shards)
        self.spans.ask(wanted)

    def _is_here(self, shard: int) -> bool:
        if not self.cache.path(self.shards[shard]).exists():
            return False
        if self.spans is not None:
            self.spans.forget(shard)
        return True

    def renew(self, shard: int) -> bool:
        """Remove the copy of a shard if it is not what the index says; whether it was not."""
        path = self.cache.path(self.shards[shard])
        with suppress(FileNotFoundError):
            if file_sha256(path) == self.shards[shard].sha256:
                return False
            path.unlink()
            self.counters.add(damaged=1)
            return True
        return False


def open_data(location: str | Path, kind: Kind = IMAGES, cache: Mapping[str, Any] | None = None) -> Index:
    """Open the index of a data set in a folder or at a URL; `cache` is the job's `data.cache`.

    Raises DataError as `open_index` does, and when the URL cannot be read.
    """
    if not paths.is_remote(str(location)):
        return open_index(location, kind)
    remote, shards = Remote(str(location)), open_cache(cache)
    folder = _mirrored(remote, shards.folder / "index")
    try:
        index = open_index(folder, kind)
    except DataError as error:
        (folder / MEMBERS).unlink(missing_ok=True)  # a copy that was damaged here is fetched again next time
        raise DataError(str(error).replace(str(folder), remote.url)) from None
    largest = max(shard.bytes for shard in index.shards)
    if largest > shards.max_bytes:
        raise DataError(
            f"data.cache.max_bytes: must be at least {largest}, the size of the largest shard of {remote.url}, "
            f"got {shards.max_bytes} (the disk of {shards.folder} has no more where none is given)"
        )
    return dataclasses.replace(index, store=RemoteShards(remote, shards, index.shards))


def _mirrored(remote: Remote, base: Path) -> Path:
    """A folder with copies of index.json and the member table, named by the hash of the first."""
    content = remote.read("index.json", _LARGEST_INDEX)
    try:
        stated = json.loads(content)["members"]
        table = Shard(MEMBERS, int(stated["bytes"]), str(stated["sha256"]), 0)
        if not re.fullmatch(r"[0-9a-f]{64}", table.sha256):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{remote.url}/index.json: is not an index of this tool") from None
    cache = ShardCache(base, _UNBOUNDED)
    folder = base / hashlib.sha256(content).hexdigest()
    folder.mkdir(exist_ok=True)
    while not (folder / MEMBERS).exists():
        cache.fetch(remote, table)
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(cache.path(table), folder / MEMBERS)
    write_atomically(folder / "index.json", content.decode())
    return folder
