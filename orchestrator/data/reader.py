"""Read single samples of a shard by offset, and believe nothing: size, header, key and CRC are checked."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict

from orchestrator.data.index import Index
from orchestrator.errors import DataError

_BLOCK = 512
_OPEN_SHARDS = 128


def header_checksum_is_right(header: bytes) -> bool:
    """Whether a tar header states its own checksum, in one of the three ways that tar writers use."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    return header[148:156] in (b"%06o\0 " % total, b"%06o \0" % total, b"%07o\0" % total)


def header_is_of(header: bytes, member: str) -> bool:
    """Whether a tar header states the name of a member, as far as the header can hold it; suffixes in any case.

    A name that does not fit stands in a member before (GNU, PAX), and its beginning here; one that is not ASCII may
    stand here in any spelling.
    """
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0")
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    stem, dot, suffix = name.rpartition(b".")
    if stem + dot + suffix.lower() == member.encode() or not member.isascii():
        return True
    return len(member) > 100 and len(name) == 100 and member.lower().startswith(name.decode(errors="replace").lower())


class _File:
    """An open shard; closed when nobody holds it any more, so never under a thread that reads."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardReader:
    """Reads samples of one index; safe to use from several threads, which do not wait for one another's disk."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._suffixes = index.kind.suffixes
        self._paths = [f"{index.place}/{shard.name}" for shard in index.shards]
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, i: int) -> str:
        """The shard that holds sample i."""
        return self._paths[int(self.index.members["shard"][i])]

    def read(self, i: int) -> tuple[str, str, bytes]:
        """(key, suffix, bytes) of sample i. Raises DataError naming shard, key, expected and found."""
        try:
            return self._read(i)
        except DataError:
            # A copy of a remote shard can be damaged here: then the original is asked once more.
            store, shard = self.index.store, int(self.index.members["shard"][i])
            if store is None or shard >= len(self._paths) or not store.renew(shard):
                raise
        return self._read(i)

    def _read(self, i: int) -> tuple[str, str, bytes]:
        raw_key, shard, offset, length, crc, label, kind = self.index.members[i].item()
        key = raw_key.decode(errors="replace")
        if shard >= len(self._paths) or offset < _BLOCK or kind >= len(self._suffixes):
            raise DataError(
                f"{self.index.place}: key {key}: its row in the member table is damaged "
                f"(shard {shard}, offset {offset}, suffix {kind}); check with: orchestrator data verify"
            )
        member = f"{key}.{self._suffixes[kind]}"
        where = f"{self._paths[shard]}: key {key}"
        file = self._file(shard)
        try:
            raw = os.pread(file.descriptor, _BLOCK + length, offset - _BLOCK)
        except OSError as error:
            raise DataError(f"{where}: cannot be read: {error.strerror}") from None
        if len(raw) != _BLOCK + length:
            raise DataError(f"{where}: expected {length} bytes at {offset}, found {max(0, len(raw) - _BLOCK)}")
        header, payload = raw[:_BLOCK], raw[_BLOCK:]
        name = header[:100].rstrip(b"\0").decode(errors="replace")
        if not header_is_of(header, member) or not header_checksum_is_right(header):
            raise DataError(f"{where}: the header of member .{self._suffixes[kind]} is damaged (found name {name!r})")
        found = zlib.crc32(payload)
        if found != crc:
            raise DataError(f"{where}: member .{self._suffixes[kind]}: expected CRC32 {crc:08x}, found {found:08x}")
        if label >= len(self.index.classes):
            raise DataError(f"{where}: member .cls: label {label} is outside of {len(self.index.classes)} classes")
        return key, self._suffixes[kind], payload

    def _file(self, shard: int) -> _File:
        if self.index.store is not None:  # copies are not kept open: the cache could not make room
            return self._checked(shard, _File(self.index.store.open(shard)))
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
            self._files[shard] = file = self._opened(shard)
            if len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)
            return file

    def _opened(self, shard: int) -> _File:
        path = self._paths[shard]
        try:
            file = _File(os.open(path, os.O_RDONLY))
        except OSError as error:
            raise DataError(f"{path}: the shard cannot be opened: {error.strerror}") from None
        return self._checked(shard, file)

    def _checked(self, shard: int, file: _File) -> _File:
        path, expected = self._paths[shard], self.index.shards[shard].bytes
        size = os.fstat(file.descriptor).st_size
        if size != expected:
            raise DataError(f"{path}: expected {expected} bytes, found {size}; the shard changed after packing")
        return file

    def close(self) -> None:
        """Let go of all shards."""
        with self._lock:
            self._files.clear()
