"""Check a packed data set against its index, byte by byte, and every image by decoding it."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.decode import BadImage, decode
from orchestrator.data.index import SUFFIXES, Index, Shard, file_sha256
from orchestrator.data.reader import ShardReader
from orchestrator.errors import DataError

Indices = NDArray[np.int64]
Progress = Callable[[int, int], None]


def problems(index: Index, progress: Progress | None = None) -> list[str]:
    """Everything that is wrong, one line each; empty when the data are what the index says."""
    wrong = _table_problems(index)
    reader = ShardReader(index)
    done = 0
    for number, shard in enumerate(index.shards):
        rows = np.flatnonzero(index.members["shard"] == number)
        path = index.folder / shard.name
        try:
            found = file_sha256(path)
        except OSError as error:
            wrong.append(f"{path}: cannot be read: {error.strerror}")
            continue
        if found != shard.sha256:
            wrong.append(f"{path}: expected SHA-256 {shard.sha256}, found {found}")
        if os.path.getsize(path) == shard.bytes:
            wrong += _image_problems(reader, rows, done, progress)
            if found == shard.sha256:
                wrong += _member_problems(index, shard, rows)
        done += len(rows)
    return wrong


def _table_problems(index: Index) -> list[str]:
    """What is wrong with the member table as a whole."""
    wrong = []
    if not index.table_is_right():
        wrong.append(f"{index.folder}: the member table is not the one that index.json states")
    keys, counts = np.unique(index.members["key"], return_counts=True)
    wrong += [f"{index.folder}: key {key.decode(errors='replace')} is there twice" for key in keys[counts > 1][:10]]
    strays = np.count_nonzero(index.members["shard"] >= len(index.shards))
    if strays:
        wrong.append(f"{index.folder}: {strays} samples lie in shards that the index does not name")
    return wrong


def _image_problems(reader: ShardReader, rows: Indices, done: int, progress: Progress | None) -> list[str]:
    """Header, CRC32 and pixels of every image of a shard."""
    wrong = []
    for count, i in enumerate(rows.tolist(), start=1):
        try:
            key, _, data = reader.read(i)
            decode(data, image_size=8, channels=3)
        except DataError as error:
            wrong.append(str(error))
        except BadImage as error:
            wrong.append(f"{reader.path(i)}: key {key}: {error}")
        if progress is not None:
            progress(done + count, reader.index.num_samples)
    return wrong


def _member_problems(index: Index, shard: Shard, rows: Indices) -> list[str]:
    """Members of a shard against the index: an image and its class for every row, in order, and nothing else."""
    path = index.folder / shard.name
    wrong = []
    if len(rows) != shard.samples:
        wrong.append(f"{path}: expected {shard.samples} samples, the member table has {len(rows)}")
    expected = []
    for key, _, _, _, _, label, kind in index.members[rows].tolist():
        name = key.decode(errors="replace")
        expected += [(f"{name}.{SUFFIXES[kind]}" if kind < len(SUFFIXES) else name, None), (f"{name}.cls", str(label))]
    with tarfile.open(path, "r:") as tar:
        found = [(m.name, _text(tar, m) if m.name.endswith(".cls") else None) for m in tar]
    for (name, label), (other, stated) in zip(expected, found, strict=False):
        if name != other:
            wrong.append(f"{path}: expected member {name}, found {other}")
            break
        if label != stated:
            wrong.append(f"{path}: key {name[:-4]}: the shard says class {stated}, the index {label}")
    if len(found) != len(expected):
        wrong.append(f"{path}: expected {len(expected)} members, found {len(found)}")
    return wrong


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    content = tar.extractfile(member)
    return "" if content is None else content.read(20).decode(errors="replace")
