"""Read single samples of a shard by offset, and believe nothing: size, header, key and CRC are checked."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict

from orchestrator.data.index import SUFFIXES, Index
from orchestrator.errors import DataError

_BLOCK = 512
_OPEN_SHARDS = 128


def header_checksum_is_right(header: bytes) -> bool:
    """Whether a tar header states its own checksum, in one of the three ways that tar writers use."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    return header[148:156] in (b"%06o\0 " % total, b"%06o \0" % total, b"%07o\0" % total)


class ShardReader:
    """Reads samples of one index; safe to use from several threads."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, i: int) -> tuple[str, str, bytes]:
        """(key, suffix, bytes) of sample i. Raises DataError naming shard, key, expected and found."""
        row = self.index.members[i]
        key, suffix = row["key"].decode(), SUFFIXES[row["suffix"]]
        shard, offset, length = int(row["shard"]), int(row["offset"]), int(row["length"])
        where = f"{self.index.folder / self.index.shards[shard].name}: key {key}"
        with self._lock:
            # Held while reading, so that no other thread closes the file under us; the page cache makes it short.
            raw = os.pread(self._descriptor(shard), _BLOCK + length, offset - _BLOCK)
        if len(raw) != _BLOCK + length:
            raise DataError(f"{where}: expected {length} bytes at {offset}, found {max(0, len(raw) - _BLOCK)}")
        header, payload = raw[:_BLOCK], raw[_BLOCK:]
        name = header[:100].rstrip(b"\0").decode(errors="replace")
        if name != f"{key}.{suffix}" or not header_checksum_is_right(header):
            raise DataError(f"{where}: the header of member .{suffix} is damaged (found name {name!r})")
        found = zlib.crc32(payload)
        if found != row["crc32"]:
            raise DataError(f"{where}: member .{suffix}: expected CRC32 {int(row['crc32']):08x}, found {found:08x}")
        if row["label"] >= len(self.index.classes):
            raise DataError(
                f"{where}: member .cls: label {row['label']} is outside of {len(self.index.classes)} classes"
            )
        return key, suffix, payload

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        entry = self.index.shards[shard]
        path = self.index.folder / entry.name
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: the shard cannot be opened: {error.strerror}") from None
        size = os.fstat(descriptor).st_size
        if size != entry.bytes:
            os.close(descriptor)
            raise DataError(f"{path}: expected {entry.bytes} bytes, found {size}; the shard changed after packing")
        self._files[shard] = descriptor
        if len(self._files) > _OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()
