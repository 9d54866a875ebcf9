"""Check a packed data set against its index, byte by byte, and every image by decoding it."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable

from orchestrator.data.decode import BadImage, decode
from orchestrator.data.index import Index
from orchestrator.data.reader import ShardReader
from orchestrator.errors import DataError


def problems(index: Index, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Everything that is wrong, one line each; empty when the data are what the index says."""
    wrong: list[str] = []
    table = index.folder / "members.npy"
    labels_in_shards: dict[str, str] = {}
    for shard in index.shards:
        path = index.folder / shard.name
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            wrong.append(f"{path}: cannot be read: {error.strerror}")
            continue
        if found != shard.sha256:
            wrong.append(f"{path}: expected SHA-256 {shard.sha256}, found {found}")
            continue
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(".cls"):
                    content = tar.extractfile(member)
                    assert content is not None
                    labels_in_shards[member.name[:-4]] = content.read().decode()
    if table.stat().st_size == 0:
        wrong.append(f"{table}: is empty")
    reader = ShardReader(index)
    for i in range(index.num_samples):
        try:
            key, _, data = reader.read(i)
            decode(data, image_size=8, channels=3)
            stated = labels_in_shards.get(key)
            if stated is not None and stated != str(int(index.members["label"][i])):
                wrong.append(f"key {key}: the shard says class {stated}, the index {index.members['label'][i]}")
        except DataError as error:
            wrong.append(str(error))
        except BadImage as error:
            wrong.append(f"key {index.key(i)}: {error}")
        if progress is not None:
            progress(i + 1, index.num_samples)
    return wrong
