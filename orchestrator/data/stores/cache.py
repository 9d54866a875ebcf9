"""Shards of remote data on the local disk: whole, proven and bounded, shared by all processes of a node.

A file is named by the SHA-256 of its bytes and appears by a rename when it has been proved. What is on its way is
`SHA256-BYTES.part`, held by a lock that ends with its process, so that a killed transfer is taken up where it was cut.
The files used longest ago make room. Nobody keeps one open, so what is removed is free at once.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.data.index import Shard, file_sha256
from orchestrator.data.stores.remote import Remote, Stopped
from orchestrator.errors import DataError
from orchestrator.storage import is_at

_POLL_S = 0.05
_LEFTOVER_S = 24 * 3600.0
_PART = re.compile(r"[0-9a-f]{64}-(\d+)\.part")
_WHOLE = re.compile(r"[0-9a-f]{64}\.tar")


def default_folder() -> Path:
    """Where shards are kept when the job names no folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hff-orchestrator" / "shards"


class ShardCache:
    """A folder of shards of at most `max_bytes` together; 0 stands for half of what the disk can hold."""

    def __init__(self, folder: Path, max_bytes: int = 0) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self.max_bytes = max_bytes or (shutil.disk_usage(folder).free + self.used_bytes()) // 2
        except OSError as error:
            raise DataError(f"data.cache.folder: {folder}: cannot be used: {error.strerror}") from None

    def path(self, shard: Shard) -> Path:
        """Where a shard lies when it is here."""
        return self.folder / f"{shard.sha256}.tar"

    def used_bytes(self) -> int:
        """Bytes of all files here, whole or on their way."""
        used = 0
        for entry in self._files():
            with suppress(FileNotFoundError):  # removed or renamed at this moment
                used += entry.stat().st_size
        return used

    def touch(self, shard: Shard) -> bool:
        """Mark a shard as used now; False when it is not here."""
        try:
            os.utime(self.path(shard))
        except FileNotFoundError:
            return False
        return True

    def fetch(self, remote: Remote, shard: Shard, stop: threading.Event | None = None, *, wait: bool = True) -> bool:
        """Bring a shard here, if another thread or process does not already; with `wait`, see it through.

        Raises DataError when it cannot be read or is damaged twice in a row; Stopped.
        """
        while not self.path(shard).exists():
            with self._part(shard) as part:
                if part is not None and (self.path(shard).exists() or self._fetched(remote, shard, part, stop)):
                    return True
            if not wait:
                return False
            # Its room or its bytes are in other hands: these finish, or end with their process.
            if (stop or threading.Event()).wait(_POLL_S * random.uniform(0.5, 1.5)):
                raise Stopped
        return True

    def _fetched(self, remote: Remote, shard: Shard, part: BinaryIO, stop: threading.Event | None) -> bool:
        if not self._make_room(part, shard.bytes):
            return False
        where = Path(part.name)
        try:
            bring(remote, shard.name, part, shard.bytes, shard.sha256, stop)
        except OSError as error:
            raise DataError(f"data.cache.folder: {where}: cannot be written: {error.strerror}") from None
        os.replace(where, self.path(shard))
        return True

    def _make_room(self, mine: BinaryIO, size: int) -> bool:
        """Remove what was used longest ago until `size` bytes fit; False while others hold too much."""
        with self._folder_lock():
            held, free = size, []
            for entry in self._files():
                found = _PART.fullmatch(entry.name)
                if entry.path == mine.name:
                    continue
                with suppress(FileNotFoundError):
                    if found and _is_held(entry.path):
                        held += int(found.group(1))
                    else:
                        stat = entry.stat()
                        free.append((stat.st_mtime, stat.st_size, entry.path))
            free.sort()
            used = held + sum(size for _, size, _ in free)
            for _, size, path in free:
                if used <= self.max_bytes:
                    break
                used -= size if _removed(path) else 0
            return used <= self.max_bytes

    @contextmanager
    def _part(self, shard: Shard) -> Iterator[BinaryIO | None]:
        """The file of a transfer, made if need be and locked, or None while somebody else has it."""
        path = self.folder / f"{shard.sha256}-{shard.bytes}.part"
        with ExitStack() as opened:
            # Who makes room tries the lock of every part for a moment, and removes those that nobody has.
            with self._folder_lock():
                file = opened.enter_context(open(path, "ab"))
                # The one who had it before may be renaming or removing it.
                mine = _try_lock(file) and is_at(file, path)
            try:
                yield file if mine else None
            finally:
                if mine and os.fstat(file.fileno()).st_size == 0 and is_at(file, path):
                    os.unlink(path)

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        with open(self.folder / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _files(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.folder) as entries:
            yield from (e for e in entries if _PART.fullmatch(e.name) or _WHOLE.fullmatch(e.name))

    def _remove_leftovers(self) -> None:
        """Parts that nobody took up for a day belong to data that nobody reads any more."""
        with self._folder_lock():
            for entry in self._files():
                with suppress(FileNotFoundError):
                    old = time.time() - entry.stat().st_mtime > _LEFTOVER_S
                    if old and _PART.fullmatch(entry.name):
                        _removed(entry.path)


def bring(
    remote: Remote, name: str, part: BinaryIO, size: int, sha256: str, stop: threading.Event | None = None
) -> None:
    """Complete `part` and prove it; once from its first byte again when it is not right. Raises DataError."""
    for last in (False, True):
        remote.append(name, part, size, stop)
        found = file_sha256(Path(part.name))
        if found == sha256:
            return
        part.truncate(0)
        if last:
            raise DataError(
                f"{remote.url}/{name}: expected SHA-256 {sha256}, found {found}, twice; the file changed after "
                "packing: upload what the index was made for"
            )
        remote.counters.add(damaged=1)


def _is_held(path: str) -> bool:
    with open(path, "rb") as file:
        return not _try_lock(file)


def _removed(path: str) -> bool:
    """Remove a file unless a transfer has it; whether it is gone."""
    try:
        with open(path, "rb") as file:
            if not _try_lock(file):
                return False
            os.unlink(path)
    except FileNotFoundError:
        pass
    return True


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_cache(settings: Mapping[str, Any] | None) -> ShardCache:
    """The cache that a job's `data.cache` describes; None for the defaults."""
    settings = settings or {}
    folder = settings.get("folder")
    return ShardCache(Path(folder) if folder else default_folder(), settings.get("max_bytes") or 0)
