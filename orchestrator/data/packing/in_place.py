"""An index for WebDataset shards that somebody else wrote; the shards stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from orchestrator.data.index import Index, Rows, Shard, member_dtype, open_index, write_index
from orchestrator.data.packing.labels import Labelling, named, read_labels
from orchestrator.data.packing.scan import scan_shard
from orchestrator.data.parallel import results
from orchestrator.errors import DataError

Progress = Callable[[int, int], None]

# A greater number is no class but damage; so many names would fill the memory.
_MOST_CLASSES = 2**20


def index_in_place(
    folder: Path, *, labelling: Labelling | None = None, jobs: int = 1, progress: Progress | None = None
) -> Index:
    """Read every shard (*.tar) of a folder once and write index.json and members.npy beside them.

    Labels are the numbers of the .cls members; the classes are called like the numbers, or as in
    `labelling.classes`. Progress counts shards. Raises DataError naming shard, key and member.
    """
    labelling = labelling or Labelling()
    folder = Path(folder)
    if (folder / "index.json").exists():
        raise DataError(f"{folder}: has an index already; remove {folder / 'index.json'} to make it afresh")
    paths = _shards(folder)
    found: list[tuple[int, Shard, Rows]] = []
    if progress is not None:
        progress(0, len(paths))
    for scanned in results(scan_shard, enumerate(paths), min(jobs, len(paths))):
        found.append(scanned)
        if progress is not None:
            progress(len(found), len(paths))
    found.sort(key=lambda scanned: scanned[0])
    rows = _joined([rows for _, _, rows in found])
    if not len(rows):
        raise DataError(f"{folder}: its shards hold no samples")
    _no_key_twice(rows, paths)
    labels = read_labels(labelling)
    if labels.classes is None:
        _labels_in_range(rows, paths, _MOST_CLASSES, "that there can be")
        classes = tuple(str(i) for i in range(int(rows["label"].max()) + 1))
    else:
        classes = labels.classes
        _labels_in_range(rows, paths, len(classes), f"of {labelling.classes}")
    shards = [shard for _, shard, _ in found]
    write_index(folder, classes, shards, rows, folder.resolve().name, extra=named(classes, labels.names))
    return open_index(folder)


def _shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    packed = [name for name in names if name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"))]
    if packed:
        raise DataError(f"{folder / packed[0]}: is compressed, so no sample of it can be read alone; unpack it to .tar")
    shards = [folder / name for name in names if name.endswith(".tar")]
    if not shards:
        raise DataError(f"{folder}: no WebDataset shards (*.tar) there; images are packed with: orchestrator data pack")
    return shards


def _joined(tables: Sequence[Rows]) -> Rows:
    longest = max(rows.dtype["key"].itemsize for rows in tables)
    return np.concatenate([rows.astype(member_dtype(longest)) for rows in tables])


def _no_key_twice(rows: Rows, paths: Sequence[Path]) -> None:
    order = np.argsort(rows["key"], kind="stable")
    ordered = rows["key"][order]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        first, second = rows[order[twice[0]]], rows[order[twice[0] + 1]]
        raise DataError(
            f"{paths[second['shard']]}: key {second['key'].decode()}: is in {paths[first['shard']].name} too; "
            "keys must differ within a set"
        )


def _labels_in_range(rows: Rows, paths: Sequence[Path], classes: int, whose: str) -> None:
    outside = np.flatnonzero(rows["label"] >= classes)
    if len(outside):
        row = rows[outside[0]]
        raise DataError(
            f"{paths[row['shard']]}: key {row['key'].decode()}: member .cls: label {row['label']} is outside of the "
            f"{classes} classes {whose}"
        )
