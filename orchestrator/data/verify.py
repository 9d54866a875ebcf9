"""Check a data set against its index, byte by byte, and if wanted every image by decoding it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from orchestrator.data.images.decode import BadImage, decode
from orchestrator.data.index import SUFFIXES, Index, ShardStore, file_sha256
from orchestrator.data.names import source_names
from orchestrator.data.packing.scan import Found, scan, table
from orchestrator.data.parallel import results
from orchestrator.data.reader import ShardReader
from orchestrator.errors import DataError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in one line; `key` where it concerns one sample, which could be left out.

    `bytes_only`: the shard as a whole has another hash, which any other problem of it explains.
    """

    text: str
    shard: int | None = None
    key: str | None = None
    bytes_only: bool = False


@dataclass(frozen=True)
class _Check:
    """One shard with its rows: an index of its own, small enough to be sent to another process."""

    number: int
    index: Index
    decode: bool

    @property
    def where(self) -> str:
        """The shard, for messages."""
        return f"{self.index.place}/{self.index.shards[0].name}"


@dataclass(frozen=True)
class _OneOf:
    """One shard of a store, as a store of its own."""

    store: ShardStore
    number: int

    @property
    def url(self) -> str:
        return self.store.url

    def path(self, shard: int) -> Path:
        return self.store.path(self.number + shard)

    def open(self, shard: int) -> int:
        return self.store.open(self.number + shard)

    def early(self, wanted: Sequence[tuple[int, int, int]]) -> list[bytes | None]:
        """Whole shards are verified."""
        return []

    def renew(self, shard: int) -> bool:
        return self.store.renew(self.number + shard)


def problems(index: Index, *, decode: bool = False, jobs: int = 1, progress: Progress | None = None) -> list[Problem]:
    """Everything that is wrong, in the order of the shards; empty when the data are what the index says."""
    found: dict[int, list[Problem]] = {}
    done = 0
    if progress is not None:
        progress(0, index.num_samples)
    # A store and its open connections stay in this process.
    jobs = min(jobs, len(index.shards)) if index.store is None else 1
    for number, samples, wrong in results(_checked, _checks(index, decode), jobs):
        found[number] = wrong
        done += samples
        if progress is not None:
            progress(done, index.num_samples)
    return [*_table_problems(index), *_with_names(index, [p for number in sorted(found) for p in found[number]])]


def _with_names(index: Index, found: Sequence[Problem]) -> list[Problem]:
    """Problems of samples with what these were called before they were packed."""
    names = source_names(index, {problem.key for problem in found if problem.key is not None})
    return [replace(p, text=f"{p.text} (packed from {names[p.key]})") if p.key in names else p for p in found]


def left_out(wrong: Iterable[Problem]) -> tuple[dict[str, str], list[Problem]]:
    """Reason by key of what leaving out samples would repair, and the problems that it would not."""
    wrong = list(wrong)
    reasons: dict[str, str] = {}
    for problem in wrong:
        if problem.key is not None:
            reasons.setdefault(problem.key, problem.text)
    explained = {problem.shard for problem in wrong if problem.key is not None}
    rest = [p for p in wrong if p.key is None and not (p.bytes_only and p.shard in explained)]
    return reasons, rest


def _checks(index: Index, decode: bool) -> Iterator[_Check]:
    order = np.argsort(index.members["shard"], kind="stable")
    borders = np.searchsorted(index.members["shard"][order], np.arange(len(index.shards) + 1))
    for number, shard in enumerate(index.shards):
        rows = np.array(index.members[order[borders[number] : borders[number + 1]]])
        rows["shard"] = 0
        store = None if index.store is None else _OneOf(index.store, number)
        yield _Check(number, replace(index, shards=(shard,), members=rows, store=store), decode)


def _table_problems(index: Index) -> list[Problem]:
    """What is wrong with the member table as a whole."""
    wrong = []
    if not index.table_is_right():
        wrong.append(f"{index.place}: the member table is not the one that index.json states")
    keys, counts = np.unique(index.members["key"], return_counts=True)
    wrong += [f"{index.place}: key {key.decode(errors='replace')} is there twice" for key in keys[counts > 1][:10]]
    strays = np.count_nonzero(index.members["shard"] >= len(index.shards))
    if strays:
        wrong.append(f"{index.place}: {strays} samples lie in shards that the index does not name")
    return [Problem(text) for text in wrong]


def _checked(check: _Check) -> tuple[int, int, list[Problem]]:
    """Number of the shard, its samples, and what is wrong with it."""
    rows = check.index.members
    return check.number, len(rows), list(_shard_problems(check))


def _shard_problems(check: _Check) -> Iterator[Problem]:
    where, shard, number = check.where, check.index.shards[0], check.number
    try:
        path = check.index.shard_path(0)
        size, found = path.stat().st_size, file_sha256(path)
    except OSError as error:
        yield Problem(f"{where}: cannot be read: {error.strerror}", number)
        return
    except DataError as error:  # a remote shard that cannot be had, or is another one
        yield Problem(str(error), number)
        return
    if size != shard.bytes:
        yield Problem(f"{where}: expected {shard.bytes} bytes, found {size}; get the shard again", number)
        return
    if len(check.index.members) != shard.samples:
        rows = len(check.index.members)
        yield Problem(f"{where}: expected {shard.samples} samples, the member table has {rows}", number)
    whole = found == shard.sha256
    if not whole:
        yield Problem(f"{where}: expected SHA-256 {shard.sha256}, found {found}", number, bytes_only=True)
    yield from _member_problems(check, path, whole=whole)
    if not whole or check.decode:
        yield from _image_problems(check)


def _member_problems(check: _Check, path: Path, *, whole: bool) -> Iterator[Problem]:
    """The shard's own members against the rows of the index."""
    where, rows = check.where, check.index.members
    samples: list[Found] = []
    # Where the bytes are others than they were, reading each image says it better.
    columns = ("offset", "length", "crc32") if whole else ("offset", "length")
    stopped = None
    try:
        for sample in scan(path, where):
            samples.append(sample)
    except DataError as error:
        stopped = error
    found = {row["key"].decode(): row for row in table(samples)}
    stated = {row["key"].decode(errors="replace"): row for row in rows}
    for key, row in stated.items():
        if key in found:
            for text in _differences(found[key], row, columns):
                yield Problem(f"{where}: key {key}: {text}", check.number, key)
        elif stopped is None:
            yield Problem(f"{where}: key {key}: is in the index, but not in the shard", check.number, key)
    for key in found.keys() - stated.keys():
        yield Problem(f"{where}: key {key}: is in the shard, but not in the index", check.number)
    if stopped is not None:
        missing = [key for key in stated if key not in found]
        yield Problem(str(stopped), check.number, missing[0] if missing else None)


def _differences(found: np.void, stated: np.void, columns: Sequence[str]) -> Iterator[str]:
    if found["label"] != stated["label"]:
        yield f"the shard says class {found['label']}, the index {stated['label']}"
    for column in columns:
        if found[column] != stated[column]:
            yield f"{column}: the shard has {found[column]}, the index {stated[column]}"
    if found["suffix"] != stated["suffix"]:
        yield f"the shard has a .{SUFFIXES[found['suffix']]}, the index suffix {stated['suffix']}"


def _image_problems(check: _Check) -> Iterator[Problem]:
    """Header and CRC32 of every image of a shard, and its pixels."""
    reader = ShardReader(check.index)
    try:
        for i in range(len(check.index.members)):
            key = check.index.members["key"][i].decode(errors="replace")
            try:
                data = reader.read(i)[2]
                if check.decode:
                    decode(data, image_size=8, channels=3)
            except DataError as error:
                yield Problem(str(error), check.number, key)
            except BadImage as error:
                yield Problem(f"{check.where}: key {key}: {error}", check.number, key)
    finally:
        reader.close()
