"""Read single samples of a shard by offset, and believe nothing: size, header, key and CRC are checked."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.index import HEADER_BYTES, Index
from orchestrator.errors import DataError

_CHECKSUM = slice(148, 156)
_OPEN_SHARDS = 128

# (key, suffix, bytes) of a sample, and its row of the member table as Python values.
Sample = tuple[str, str, bytes]
Row = tuple[bytes, int, int, int, int, int, int]


def _header_sums(raws: Sequence[bytes]) -> list[int]:
    """The sum of the header that each of them begins with, its own checksum taken for blanks."""
    headers = np.frombuffer(b"".join([raw[:HEADER_BYTES] for raw in raws]), dtype=np.uint8).reshape(-1, HEADER_BYTES)
    sums = headers.sum(axis=1, dtype=np.int64) - headers[:, _CHECKSUM].sum(axis=1, dtype=np.int64) + 8 * 32
    found: list[int] = sums.tolist()
    return found


def _is_checksum(stated: bytes, total: int) -> bool:
    """Whether a header states its sum, in one of the three ways that tar writers use."""
    return stated in (b"%06o\0 " % total, b"%06o \0" % total, b"%07o\0" % total)


def header_is_of(header: bytes, member: str) -> bool:
    """Whether a tar header states the name of a member, as far as the header can hold it; suffixes in any case.

    A name that does not fit stands in a member before (GNU, PAX), and its beginning here; one that is not ASCII may
    stand here in any spelling.
    """
    if header.startswith(member.encode() + b"\0") and not header[345]:
        return True
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0")
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    stem, dot, suffix = name.rpartition(b".")
    if stem + dot + suffix.lower() == member.encode() or not member.isascii():
        return True
    return len(member) > 100 and len(name) == 100 and member.lower().startswith(name.decode(errors="replace").lower())


class _Damaged(DataError):
    """What was read is not what the index says; `shard` is where."""

    shard = -1  # set afterwards, so that it goes from process to process


def _damaged(shard: int, text: str) -> _Damaged:
    error = _Damaged(text)
    error.shard = shard
    return error


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

    def read(self, i: int) -> Sample:
        """(key, suffix, bytes) of sample i. Raises DataError naming shard, key, expected and found."""
        return self.read_many(np.array([i]))[0]

    def read_many(self, indices: NDArray[np.int64]) -> list[Sample]:
        """(key, suffix, bytes) of each sample. Raises DataError as `read` does."""
        if not len(indices):
            return []
        rows: list[Row] = self.index.members[indices].tolist()
        for row in rows:
            self._refuse_damaged(row)
        store, early = self.index.store, list[bytes | None]()
        if store is not None:
            early = store.early([(shard, at - HEADER_BYTES, at + length) for _, shard, at, length, _, _, _ in rows])
        renewed: set[int] = set()
        while True:
            try:
                return self._read(rows, early)
            except _Damaged as error:
                if any(early):  # a part may be damaged: its shard is asked
                    early = []
                # A copy of a remote shard can be damaged here: then the original is asked once more.
                elif store is None or error.shard in renewed or not store.renew(error.shard):
                    raise
                else:
                    renewed.add(error.shard)

    def _refuse_damaged(self, row: Row) -> None:
        raw_key, shard, offset, _, _, _, kind = row
        if shard >= len(self._paths) or offset < HEADER_BYTES or kind >= len(self._suffixes):
            raise DataError(
                f"{self.index.place}: key {raw_key.decode(errors='replace')}: its row in the member table is damaged "
                f"(shard {shard}, offset {offset}, suffix {kind}); check with: orchestrator data verify"
            )

    def _read(self, rows: Sequence[Row], early: Sequence[bytes | None] = ()) -> list[Sample]:
        files: dict[int, _File] = {}
        raws = [raw or self._raw(row, files) for row, raw in zip_longest(rows, early)]
        return [self._checked_sample(*of) for of in zip(rows, raws, _header_sums(raws), strict=True)]

    def _raw(self, row: Row, files: dict[int, _File]) -> bytes:
        """Header and image as the shard has them; `files` are those of the shards that were asked for before."""
        _, shard, offset, length, _, _, _ = row
        file = files.get(shard) or files.setdefault(shard, self._file(shard))
        try:
            raw = os.pread(file.descriptor, HEADER_BYTES + length, offset - HEADER_BYTES)
        except OSError as error:
            raise _damaged(shard, f"{self._where(row)}: cannot be read: {error.strerror}") from None
        if len(raw) != HEADER_BYTES + length:
            found = max(0, len(raw) - HEADER_BYTES)
            raise _damaged(shard, f"{self._where(row)}: expected {length} bytes at {offset}, found {found}")
        return raw

    def _where(self, row: Row) -> str:
        return f"{self._paths[row[1]]}: key {row[0].decode(errors='replace')}"

    def _checked_sample(self, row: Row, raw: bytes, header_sum: int) -> Sample:
        raw_key, shard, _, _, crc, label, kind = row
        key, suffix = raw_key.decode(errors="replace"), self._suffixes[kind]
        if not header_is_of(raw, f"{key}.{suffix}") or not _is_checksum(raw[_CHECKSUM], header_sum):
            name = raw[:100].rstrip(b"\0").decode(errors="replace")
            raise _damaged(
                shard, f"{self._where(row)}: the header of member .{suffix} is damaged (found name {name!r})"
            )
        payload = raw[HEADER_BYTES:]
        found = zlib.crc32(payload)
        if found != crc:
            raise _damaged(shard, f"{self._where(row)}: member .{suffix}: expected CRC32 {crc:08x}, found {found:08x}")
        if label >= len(self.index.classes):
            count = len(self.index.classes)
            raise DataError(f"{self._where(row)}: member .cls: label {label} is outside of {count} classes")
        return key, suffix, payload

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
            raise _damaged(shard, f"{path}: expected {expected} bytes, found {size}; the shard changed after packing")
        return file

    def close(self) -> None:
        """Let go of all shards."""
        with self._lock:
            self._files.clear()
