"""The index beside the shards: what every sample is, where it lies and how its bytes are proved.

`index.json` names classes, shards (bytes, SHA-256, samples) and the member table; `members.npy` is that table,
memory-mapped, one row per sample. `Index.sha256` is the identity of the data, wherever they lie. Images and cached
features are two kinds of the same form.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import DataError
from orchestrator.storage import write_atomically

VERSION = 1
SUFFIXES = ("jpg", "png", "jpeg")
MEMBERS = "members.npy"
# A member's header in a shard, just before its payload.
HEADER_BYTES = 512
Rows = NDArray[Any]
# Tables up to this size (ImageNet's has 45 MB) are hashed when they are opened, larger ones by `data verify` alone.
_HASHED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Kind:
    """What a set of shards holds: its name in index.json, the suffixes of its members and the command that makes it."""

    format: str
    suffixes: tuple[str, ...]
    command: str


IMAGES = Kind("hff-shards", SUFFIXES, "orchestrator data pack SOURCE {folder}")
FEATURES = Kind("hff-features", ("npy",), "orchestrator data features JOB")


def member_dtype(key_bytes: int) -> np.dtype[Any]:
    """A row: key, shard, payload offset in it, payload bytes, CRC32 of the payload, label, suffix number."""
    return np.dtype(
        [
            ("key", f"S{key_bytes}"),
            ("shard", "<u4"),
            ("offset", "<u8"),
            ("length", "<u4"),
            ("crc32", "<u4"),
            ("label", "<u4"),
            ("suffix", "u1"),
        ]
    )


@dataclass(frozen=True)
class Shard:
    """One tar file of the set."""

    name: str
    bytes: int
    sha256: str
    samples: int


class ShardStore(Protocol):
    """Shards that are not in the folder of their index but come from elsewhere."""

    @property
    def url(self) -> str:
        """Where they come from, for messages."""

    def path(self, shard: int) -> Path:
        """A local copy of a shard, made if need be; it may go when others need the room."""

    def open(self, shard: int) -> int:
        """A descriptor of a local copy of a shard, made if need be."""

    def early(self, wanted: Sequence[tuple[int, int, int]]) -> list[bytes | None]:
        """What (shard, first byte, byte after the last) hold, where that can be had before the shard; None or nothing
        at all: open the shard."""

    def renew(self, shard: int) -> bool:
        """Whether the local copy of a shard was damaged; it is then fetched again when it is opened."""


@dataclass(frozen=True)
class Index:
    """An opened index. Nothing of the shards themselves has been read yet.

    `source` is the name of what was packed, `ignored` the number of its files that are no images, `extra` what
    the kind states beside that, `store` where the shards are if not in `folder`, `options` those of packing,
    `left_out` why images of the source are not there, by their places in it.
    """

    folder: Path
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    sha256: str
    members: NDArray[Any]
    members_sha256: str
    source: str = ""
    ignored: int = 0
    kind: Kind = IMAGES
    extra: Mapping[str, Any] = field(default_factory=dict)
    store: ShardStore | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where the data are, for messages."""
        return str(self.folder) if self.store is None else self.store.url

    def shard_path(self, shard: int) -> Path:
        """A local file with the bytes of a shard."""
        return self.folder / self.shards[shard].name if self.store is None else self.store.path(shard)

    @property
    def num_samples(self) -> int:
        return len(self.members)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class number of every sample."""
        return self.members["label"].astype(np.int64)

    @property
    def class_names(self) -> dict[str, str]:
        """Readable names of the classes; empty when packing was not told any."""
        names = self.extra.get("class_names", ())
        return dict(zip(self.classes, names, strict=True)) if names else {}

    def key(self, i: int) -> str:
        """The sample's key in its shard."""
        key: bytes = self.members["key"][i]
        return key.decode()

    def table_is_right(self) -> bool:
        """Whether the member table on disk still has the SHA-256 that index.json states."""
        return file_sha256(self.folder / MEMBERS) == self.members_sha256

    def keys(self, indices: Iterable[int] | NDArray[np.int64]) -> list[str]:
        """Keys of many samples."""
        rows = np.asarray(indices, dtype=np.int64)
        return [key.decode() for key in self.members["key"][rows].tolist()]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(
    classes: Sequence[str], shards: Sequence[Shard], members_sha256: str, extra: Mapping[str, Any] | None
) -> str:
    content = [list(classes), [vars(s) for s in shards], members_sha256, *([dict(extra)] if extra else [])]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_index(
    folder: Path,
    classes: Sequence[str],
    shards: Sequence[Shard],
    members: NDArray[Any],
    source: str,
    ignored: int = 0,
    *,
    kind: Kind = IMAGES,
    extra: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> str:
    """Write members.npy, then index.json. Returns the identity, which covers `extra` (plain values) too."""
    table = folder / MEMBERS
    np.save(table, members)
    members_sha256 = file_sha256(table)
    identity = _identity(classes, shards, members_sha256, extra)
    content = {
        "format": kind.format,
        "version": VERSION,
        "sha256": identity,
        "source": source,
        "ignored": ignored,
        "classes": list(classes),
        "samples": len(members),
        "shards": [vars(s) for s in shards],
        "members": {"file": table.name, "bytes": table.stat().st_size, "sha256": members_sha256},
        **({"extra": dict(extra)} if extra else {}),
        **({"options": dict(options)} if options else {}),
        **({"left_out": dict(left_out)} if left_out else {}),
    }
    write_atomically(folder / "index.json", json.dumps(content, indent=1) + "\n")
    return identity


def open_index(path: str | Path, kind: Kind = IMAGES) -> Index:
    """Open the index in a folder of shards of one kind.

    Raises DataError when it is missing, is not ours, has no samples, or does not fit its member table.
    """
    folder = Path(path)
    file = folder / "index.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = "no index.json there" if folder.exists() else f"there is no such folder{_neighbour(folder)}"
        raise DataError(f"{folder}: {what}; {_remedy(folder, kind)}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    try:
        return _checked(folder, content, kind)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: is not an index of this tool: {error} is missing or wrong") from None


def _neighbour(missing: Path) -> str:
    """A hint at the packed set beside a folder that is not there whose name is like it; nothing where none is."""
    names = [file.parent.name for file in missing.parent.glob("*/index.json")]
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.75)
    return f" (did you mean {missing.parent / near[0]}?)" if near else ""


def _remedy(folder: Path, kind: Kind) -> str:
    """What to do about a missing index: it depends on what lies there instead."""
    found = [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    if kind is IMAGES and (found or folder.is_file()):
        if any(p.suffix == ".tar" for p in found):
            return f"if its tars are WebDataset shards, make it with: orchestrator data index {folder}"
        shards = folder.with_name(f"{folder.name.split('.')[0]}-shards")
        return f"images are packed into a folder of their own: orchestrator data pack {folder} {shards}"
    return "make it with: " + kind.command.format(folder=folder)


def _checked(folder: Path, content: dict[str, Any], kind: Kind) -> Index:
    file = folder / "index.json"
    if not isinstance(content, dict):
        raise DataError(f"{file}: is not an index of this tool: expected a mapping, found {type(content).__name__}")
    if content["format"] != kind.format or content["version"] != VERSION:
        found = f"found {content['format']} version {content['version']}"
        command = kind.command.format(folder=folder)
        raise DataError(f"{file}: expected format {kind.format} version {VERSION}, {found}; make it with: {command}")
    shards = tuple(Shard(**shard) for shard in content["shards"])
    if not shards or content["samples"] == 0:
        raise DataError(f"{file}: names no shards; pack the data again")
    for shard in shards:
        if Path(shard.name).name != shard.name:
            raise DataError(f"{file}: shard name {shard.name!r} must be a plain file name")
    stated = content["members"]
    if stated["file"] != MEMBERS:
        raise DataError(f"{file}: its member table must be {MEMBERS}, got {stated['file']!r}")
    in_shards = sum(shard.samples for shard in shards)
    if in_shards != content["samples"]:
        raise DataError(f"{file}: expected {content['samples']} samples, its shards have {in_shards}")
    classes = tuple(content["classes"])
    extra = content.get("extra", {})
    if len(extra.get("class_names", classes)) != len(classes):
        raise DataError(f"{file}: names {len(extra['class_names'])} of its {len(classes)} classes")
    identity = _identity(classes, shards, stated["sha256"], extra)
    if identity != content["sha256"]:
        raise DataError(f"{file}: was changed after packing: its SHA-256 is not the one that it states")
    members = _member_table(folder / MEMBERS, stated, content["samples"])
    source, ignored = content.get("source", ""), content.get("ignored", 0)
    return Index(
        folder,
        classes,
        shards,
        identity,
        members,
        stated["sha256"],
        source,
        ignored,
        kind,
        extra,
        options=content.get("options", {}),
        left_out=content.get("left_out", {}),
    )


def _member_table(table: Path, stated: dict[str, Any], samples: int) -> NDArray[Any]:
    """The table, memory-mapped. One changed label would train in silence, so its bytes are proved where it is cheap."""
    try:
        size = table.stat().st_size
        if size != stated["bytes"]:
            raise DataError(f"{table}: the member table: expected {stated['bytes']} bytes, found {size}")
        found = file_sha256(table) if size <= _HASHED_BYTES else None
        if found not in (None, stated["sha256"]):
            raise DataError(
                f"{table}: the member table was changed: expected SHA-256 {stated['sha256']}, found {found}"
            )
        members = np.load(table, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, SyntaxError, TokenError) as error:  # numpy parses the head of the file as Python
        raise DataError(f"{table}: the member table cannot be read: {error}") from None
    if members.shape != (samples,):
        raise DataError(f"{table}: the member table: expected {samples} samples, found {members.shape}")
    expected = member_dtype(1)
    if members.dtype.names != expected.names or any(
        members.dtype[name] != expected[name] for name in expected.names or () if name != "key"
    ):
        raise DataError(f"{table}: the member table has other columns than this tool writes: {members.dtype}")
    result: NDArray[Any] = members
    return result
