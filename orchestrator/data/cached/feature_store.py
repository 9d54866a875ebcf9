"""Feature sets on disk by key: made once, kept when interrupted, published when whole.

RUNS/.features/KEY holds a whole set; KEY.partial its finished shards while it is being made, each with a note of
what it holds. A key is the hash of everything that decides the numbers, so another recipe never finds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.data.cached.features import FeatureSet, Layout, Vectors
from orchestrator.data.index import FEATURES, Index, Shard, file_sha256, write_index
from orchestrator.data.packing.shard_writer import ShardWriter
from orchestrator.errors import DataError
from orchestrator.storage import write_atomically


def feature_key(recipe: Mapping[str, Any]) -> str:
    """The name of a feature set: SHA-256 of its recipe (plain values)."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class SetPlan:
    """What a feature set will be, as plain values: its place, its parts (one per head) and its source."""

    folder: str
    recipe: dict[str, Any]
    parts: tuple[int, ...]
    dtype: str
    samples: int

    @property
    def layout(self) -> Layout:
        return Layout(sum(self.parts), self.dtype)

    @property
    def partial(self) -> Path:
        """Where finished shards wait until the set is whole."""
        return Path(self.folder + ".partial")

    @property
    def lock(self) -> Path:
        """The file whose lock one driver at a time holds."""
        return Path(self.folder).with_name(f".{Path(self.folder).name}.lock")

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(first sample, end) of every shard."""
        size = self.layout.shard_samples(self.samples)
        return [(start, min(start + size, self.samples)) for start in range(0, self.samples, size)]


@dataclass(frozen=True)
class MadeShard:
    """A finished shard: its entry of the index, the CRC32 of each vector, and the samples that are no images."""

    number: int
    shard: Shard
    crc32: tuple[int, ...]
    bad: dict[int, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MadeShard:
        values = json.loads(text)
        bad = {int(i): str(fault) for i, fault in values["bad"].items()}
        return cls(int(values["number"]), Shard(**values["shard"]), tuple(values["crc32"]), bad)


def is_whole(plan: SetPlan) -> bool:
    """Whether the finished set is there: made by this recipe, its index right and every shard of its size."""
    try:
        found = FeatureSet(plan.folder)
    except DataError:
        return False
    return bool(found.index.extra["recipe"] == plan.recipe and found.index.num_samples == plan.samples)


def shard_name(number: int) -> str:
    return f"features-{number:06d}.tar"


def _note(plan: SetPlan, number: int) -> Path:
    return plan.partial / f"{shard_name(number)}.json"


def write_shard(
    plan: SetPlan, source: Index, number: int, batches: Iterable[tuple[Vectors, Mapping[int, str]]]
) -> MadeShard:
    """Write one shard of a set from batches of (vectors of the next samples, faults by sample).

    The shard gets its name when it is whole, then its note. Raises DataError when the set is not being made any
    more (another process has finished it).
    """
    start, stop = plan.ranges[number]
    temporary = plan.partial / f".{shard_name(number)}.{os.getpid()}-{time.monotonic_ns()}.tmp"
    crcs: list[int] = []
    bad: dict[int, str] = {}
    try:
        writer = ShardWriter(temporary)
        try:
            for vectors, faults in batches:
                bad |= faults
                for vector in vectors:
                    i = start + len(crcs)
                    data = plan.layout.head + vector.astype(plan.dtype, copy=False).tobytes()
                    for suffix, content in (("npy", data), ("cls", str(int(source.labels[i])).encode())):
                        _add(writer, source.key(i), suffix, content)
                    crcs.append(zlib.crc32(data))
            assert len(crcs) == stop - start, f"shard {number} has {len(crcs)} samples, expected {stop - start}"
            writer.samples = len(crcs)
            shard = replace(writer.finish(), name=shard_name(number))
        finally:
            writer.close()
        os.replace(temporary, plan.partial / shard.name)
        made = MadeShard(number, shard, tuple(crcs), bad)
        write_atomically(_note(plan, number), made.to_json())
    except FileNotFoundError:
        raise DataError(f"{plan.partial}: is gone: another process has finished or removed it") from None
    finally:
        temporary.unlink(missing_ok=True)
    return made


def _add(writer: ShardWriter, key: str, suffix: str, content: bytes) -> None:
    try:
        writer.add(f"{key}.{suffix}", content)
    except ValueError as error:  # features have one header each, which holds no longer name
        raise DataError(f"key {key}: {error}: its features cannot be kept; set features.cache to false") from None


def kept_shards(plan: SetPlan) -> list[MadeShard]:
    """Shards that an interrupted extraction finished, each proved by its SHA-256; all else there is removed."""
    plan.partial.mkdir(parents=True, exist_ok=True)
    kept = []
    for number, (start, stop) in enumerate(plan.ranges):
        try:
            made = MadeShard.from_json(_note(plan, number).read_text(encoding="utf-8"))
            path = plan.partial / shard_name(number)
            whole = made.shard.name == path.name and len(made.crc32) == made.shard.samples == stop - start
            if whole and file_sha256(path) == made.shard.sha256:
                kept.append(made)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    names = {name for made in kept for name in (made.shard.name, f"{made.shard.name}.json")}
    for path in plan.partial.iterdir():
        if path.name not in names:
            path.unlink()
    return kept


def samples_written(plan: SetPlan) -> int:
    """Samples on disk so far, told from the sizes of the files: good enough to show progress."""
    if not plan.partial.is_dir():
        return plan.samples
    written = 0
    for path in plan.partial.glob("*.tar*"):
        with suppress(FileNotFoundError):  # it got its name at this moment
            written += path.stat().st_size // plan.layout.stride
    return min(plan.samples, written)


def publish(plan: SetPlan, source: Index, shards: Sequence[MadeShard]) -> None:
    """Add the index to all shards and give the set its name."""
    ordered = sorted(shards, key=lambda made: made.number)
    assert [made.number for made in ordered] == list(range(len(plan.ranges))), "a shard is missing"
    members = source.members.copy()
    for made, (start, stop) in zip(ordered, plan.ranges, strict=True):
        rows = members[start:stop]
        rows["shard"], rows["suffix"] = made.number, 0
        rows["offset"], rows["length"] = plan.layout.member_offsets(stop - start), plan.layout.member_bytes
        rows["crc32"] = made.crc32
    extra = {
        "parts": list(plan.parts),
        "dtype": plan.dtype,
        "source_sha256": source.sha256,
        "bad": {str(i): fault for made in ordered for i, fault in made.bad.items()},
        "recipe": plan.recipe,
    }
    write_index(
        plan.partial, source.classes, [m.shard for m in ordered], members, source.source, kind=FEATURES, extra=extra
    )
    folder = Path(plan.folder)
    if folder.exists():
        shutil.rmtree(folder)  # not whole, or nobody would have made it again
    os.rename(plan.partial, folder)
    for made in ordered:
        (folder / _note(plan, made.number).name).unlink()
