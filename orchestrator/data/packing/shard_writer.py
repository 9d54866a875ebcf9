"""Write one WebDataset shard: a plain ustar file, hashed while it is written, the same bytes for the same members."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

from orchestrator.data.index import Shard


def member_bytes(length: int) -> int:
    """What a member of `length` bytes takes in a shard."""
    return tarfile.BLOCKSIZE + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class ShardWriter:
    """A plain ustar file that knows where every member's bytes begin."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close
        self._digest = hashlib.sha256()
        self.position = 0
        self.samples = 0

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.position += len(data)

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its bytes."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._put(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.position
        self._put(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> Shard:
        self._put(bytes(2 * tarfile.BLOCKSIZE))
        self._put(bytes(-self.position % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return Shard(self._path.name, self.position, self._digest.hexdigest(), self.samples)

    def close(self) -> None:
        self._file.close()
