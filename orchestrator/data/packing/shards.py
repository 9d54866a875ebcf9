"""The work of packing, shard by shard: a planned one is written anywhere and at any time, and its note says how.

An image that cannot be packed is left out of its shard and named in the note; whoever planned decides what that means.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from orchestrator.data.images.decode import BadImage, decode, suffix_of
from orchestrator.data.index import SUFFIXES, Rows, Shard, member_dtype
from orchestrator.data.packing.labels import Labelling
from orchestrator.data.packing.reencode import Encoding, encoded
from orchestrator.data.packing.shard_writer import ShardWriter
from orchestrator.data.packing.sources import Item, read_item
from orchestrator.storage import write_atomically

_KEY_DIGITS = 9
# What an image ends with. Cameras and editors add bytes behind it, and so only a tail without it is suspicious.
_ENDS = {"jpg": b"\xff\xd9", "png": b"IEND\xaeB`\x82"}
_TAIL = 64


@dataclass(frozen=True)
class Recipe:
    """What is packed, how, and where shards wait until all are there."""

    source: str | Path
    work: Path
    labelling: Labelling
    encoding: Encoding
    shard_bytes: int

    @property
    def name(self) -> str:
        """The last part of the source's path."""
        return Path(self.source).name

    @property
    def shards(self) -> Path:
        """The folder that becomes the packed set."""
        return self.work / "shards"


@dataclass(frozen=True)
class Task:
    """One shard: its number, the number of its first image, its images in order with their class numbers."""

    recipe: Recipe
    number: int
    first: int
    items: Sequence[Item]
    labels: Sequence[int]

    def key(self, i: int) -> str:
        """The key of its image `i`: the place in the plan, whether others before it are left out or not."""
        return f"{self.first + i:0{_KEY_DIGITS}d}"

    @property
    def path(self) -> Path:
        return self.recipe.shards / f"shard-{self.number:06d}.tar"

    @property
    def note(self) -> Path:
        """Written last: what the finished shard holds."""
        return self.recipe.work / f"{self.path.name}.json"

    def is_whole(self) -> bool:
        """Whether the shard was finished: its bytes were on the disk before the note was."""
        try:
            stated = json.loads(self.note.read_text(encoding="utf-8"))["shard"]["bytes"]
            return bool(self.path.stat().st_size == stated)
        except (OSError, ValueError, KeyError, TypeError):
            return False


def write_shard(task: Task, tick: Callable[[], None] = lambda: None) -> int:
    """Write one shard under a name of its own, then give it its name, then its note. Returns the images it read."""
    rows = np.zeros(len(task.items), dtype=member_dtype(_KEY_DIGITS))
    bad: dict[str, str] = {}
    temporary = task.path.with_name(f".{task.path.name}.{os.getpid()}.tmp")
    writer = ShardWriter(temporary)
    try:
        for i, (item, label) in enumerate(zip(task.items, task.labels, strict=True)):
            try:
                suffix, data = _image(item, task.recipe.encoding)
            except BadImage as error:
                bad[item.place(task.recipe.source)] = str(error)
            else:
                key = task.key(i)
                offset = writer.add(f"{key}.{suffix}", data)
                writer.add(f"{key}.cls", str(label).encode())
                place = (key.encode(), task.number, offset, len(data))
                rows[writer.samples] = (*place, zlib.crc32(data), label, SUFFIXES.index(suffix))
                writer.samples += 1
            tick()
        shard = replace(writer.finish(), name=task.path.name)
        os.replace(temporary, task.path)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    content = {"shard": asdict(shard), "rows": rows[: shard.samples].tobytes().hex(), "bad": bad}
    write_atomically(task.note, json.dumps(content))
    return len(rows)


def _image(item: Item, encoding: Encoding) -> tuple[str, bytes]:
    """Suffix and bytes of an image as it is packed. Raises BadImage."""
    data = read_item(item)
    suffix = suffix_of(data)
    if suffix is None:
        raise BadImage("neither JPEG nor PNG by its first bytes" if data else "empty file")
    if _ENDS[suffix] not in data[-_TAIL:]:
        _refuse_cut(data)
    return suffix, encoded(data, suffix, encoding) if encoding.is_asked else data


def _refuse_cut(data: bytes) -> None:
    """Raise BadImage for an image that does not decode; one whose end is there, and more behind it, does."""
    try:
        decode(data, image_size=8, channels=3)
    except BadImage as error:
        raise BadImage(f"cut off or damaged: {error}") from None


def bad_images(tasks: Sequence[Task]) -> dict[str, str]:
    """What is wrong with each image that the finished shards lack, by its place in the source, sorted."""
    found: dict[str, str] = {}
    for task in tasks:
        found |= json.loads(task.note.read_text(encoding="utf-8"))["bad"]
    return dict(sorted(found.items()))


def read_notes(tasks: Sequence[Task]) -> tuple[list[Shard], Rows]:
    """The finished shards and the rows of all their images; shards that got no image are removed."""
    shards: list[Shard] = []
    rows = [np.zeros(0, dtype=member_dtype(_KEY_DIGITS))]
    for task in tasks:
        note = json.loads(task.note.read_text(encoding="utf-8"))
        if not note["shard"]["samples"]:
            task.path.unlink(missing_ok=True)
            continue
        own: Rows = np.frombuffer(bytes.fromhex(note["rows"]), dtype=rows[0].dtype).copy()
        own["shard"] = len(shards)
        shards.append(Shard(**note["shard"]))
        rows.append(own)
    return shards, np.concatenate(rows)
