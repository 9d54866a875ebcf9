"""What a WebDataset shard holds, whoever wrote it: one walk over the tar, nothing decoded, nothing executed.

Keys and suffixes are those of the webdataset package: the key ends at the first dot of the file name, members of one
key are neighbours, suffixes do not depend on case. Where that package would give half a sample, this is an error.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from orchestrator.data.index import SUFFIXES, Rows, Shard, file_sha256, member_dtype
from orchestrator.data.packing.tar_members import Window, members, whole_file
from orchestrator.errors import DataError

# Key, offset, length, CRC32, label, number of the suffix.
Found = tuple[str, int, int, int, int, int]
_LABEL_BYTES = 20
_PIECE = 2**20


@dataclass
class _Sample:
    """A sample as far as it was read."""

    key: str
    seen: set[str] = field(default_factory=set)
    image: tuple[int, int, int, int] | None = None
    label: int | None = None


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix in small letters) of a member; None for what is no part of a sample."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    if not stem or not dot or (not slash and file.startswith("__") and file.endswith("__")):
        return None
    return folder + slash + stem, suffix.lower()


def scan(path: Path, where: str) -> Iterator[Found]:
    """(key, offset, length, CRC32, label, suffix number) of every sample, in order.

    Raises DataError, naming `where`, key and member, at the first thing that is wrong; what came before is right.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            window = whole_file(file.fileno())
            done: set[str] = set()
            for sample in _samples(window, where):
                if sample.key in done:
                    raise DataError(f"{where}: key {sample.key}: is there twice, or its members are not neighbours")
                done.add(sample.key)
                yield _row(sample, where)
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror}") from None


def _samples(window: Window, where: str) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for member in members(window, where):
        parts = split_name(member.name) if member.isfile() else None
        if parts is None:
            continue
        key, suffix = parts
        if not key.isprintable():
            raise DataError(f"{where}: key {key!r}: is no readable text")
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        if suffix in sample.seen or member.issparse():
            what = "is a sparse file" if member.issparse() else "is there twice"
            raise DataError(f"{where}: key {key}: member .{suffix} {what}")
        sample.seen.add(suffix)
        if suffix in SUFFIXES:
            if sample.image is not None:
                raise DataError(f"{where}: key {key}: has two images, .{suffix} is the second")
            offset, length = member.offset_data, member.size
            crc = _crc32(window, offset, length, f"{where}: key {key}: member .{suffix}")
            sample.image = offset, length, crc, SUFFIXES.index(suffix)
        elif suffix == "cls":
            sample.label = _label(_bytes(window, member.offset_data, member.size), f"{where}: key {key}: member .cls")
    if sample is not None:
        yield sample


def _row(sample: _Sample, where: str) -> Found:
    if sample.image is None:
        raise DataError(f"{where}: key {sample.key}: has no image (one of .{', .'.join(SUFFIXES)})")
    if sample.label is None:
        raise DataError(f"{where}: key {sample.key}: has no class (member .cls)")
    offset, length, crc, suffix = sample.image
    return sample.key, offset, length, crc, sample.label, suffix


def _bytes(window: Window, offset: int, length: int) -> bytes:
    window.seek(offset)
    return window.read(min(length, _LABEL_BYTES + 1)) or b""


def _label(content: bytes, where: str) -> int:
    text = content.strip()
    if len(content) > _LABEL_BYTES or not text.isdigit() or int(text) >= 2**32:
        raise DataError(f"{where}: expected the number of a class, found {content[:_LABEL_BYTES]!r}")
    return int(text)


def _crc32(window: Window, offset: int, length: int, where: str) -> int:
    window.seek(offset)
    crc, left = 0, length
    while left:
        piece = window.read(min(left, _PIECE))
        if not piece:
            raise DataError(f"{where}: is cut: {left} of {length} bytes are missing")
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    return crc


def table(samples: Iterable[Found], shard: int = 0) -> Rows:
    """Rows of the member table, with keys as long as the longest one."""
    found = list(samples)
    longest = max((len(key.encode()) for key, *_ in found), default=1)
    rows = np.zeros(len(found), dtype=member_dtype(longest))
    for i, (key, offset, length, crc, label, suffix) in enumerate(found):
        rows[i] = (key.encode(), shard, offset, length, crc, label, suffix)
    return rows


def scan_shard(place: tuple[int, Path]) -> tuple[int, Shard, Rows]:
    """Number, entry of the index and rows of a whole shard. Raises DataError."""
    number, path = place
    rows = table(scan(path, str(path)), number)
    return number, Shard(path.name, path.stat().st_size, file_sha256(path), len(rows)), rows
