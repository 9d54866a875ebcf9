"""An index is refused when anything in it is not what packing wrote."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.index import Index, Shard, member_dtype, open_index, write_index
from orchestrator.errors import DataError


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "index.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_one_changed_label_in_the_member_table_is_refused(small: Index) -> None:
    table = small.folder / "members.npy"
    members = np.array(small.members)
    members["label"][3] ^= 1
    np.save(table, members)
    with pytest.raises(DataError, match=r"members\.npy: the member table was changed: expected SHA-256"):
        open_index(small.folder)


def test_any_flipped_byte_of_a_member_table_is_refused(small: Index) -> None:
    table = small.folder / "members.npy"
    whole = table.read_bytes()
    for at in range(0, len(whole), 7):
        data = bytearray(whole)
        data[at] ^= 4
        table.write_bytes(data)
        with pytest.raises(DataError, match=r"members\.npy"):
            open_index(small.folder)
    table.write_bytes(whole)
    assert open_index(small.folder).sha256 == small.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["members"].update(file="../small/members.npy"), "its member table must be members.npy"),
        (lambda c: c["shards"][0].update(name="../small/shard-000000.tar"), "must be a plain file name"),
        (lambda c: c["shards"][0].update(samples=99), "expected 12 samples, its shards have"),
        (lambda c: c.pop("classes"), "'classes' is missing or wrong"),
        (lambda c: c.update(shards=[]), "names no shards"),
        (lambda c: c.update(shards=["shard-000000.tar"]), "is not an index of this tool"),
        (lambda c: c.update(version=2), "expected format hff-shards version 1"),
        (lambda c: c.update(classes=["b", "a"]), "was changed after packing"),
    ],
)
def test_a_changed_index_says_what_is_wrong(small: Index, change: Any, message: str) -> None:
    rewrite(small.folder, change)
    with pytest.raises(DataError, match=message):
        open_index(small.folder)


@pytest.mark.parametrize("text", ["[1, 2]", "null", "7", '"text"', "{", "\x00\xff"])
def test_what_is_no_index_is_refused(small: Index, text: str) -> None:
    (small.folder / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"index\.json: (is not an index of this tool|cannot be read)"):
        open_index(small.folder)


def test_a_member_table_with_other_columns_is_refused(small: Index) -> None:
    shards = list(small.shards)
    write_index(small.folder, small.classes, shards, np.zeros(12, dtype=[("key", "S9"), ("place", "<u8")]), "test")
    with pytest.raises(DataError, match="has other columns than this tool writes"):
        open_index(small.folder)


def test_the_identity_does_not_depend_on_the_place(small: Index, tmp_path: Path) -> None:
    shutil.copytree(small.folder, tmp_path / "elsewhere")
    assert open_index(tmp_path / "elsewhere").sha256 == small.sha256


def test_a_large_index_opens_without_reading_its_table(tmp_path: Path) -> None:
    count, shards = 2_500_000, 2_500
    names = [Shard(f"shard-{i:06d}.tar", 10**8, "0" * 64, count // shards) for i in range(shards)]
    write_index(tmp_path, [str(i) for i in range(1000)], names, np.zeros(count, dtype=member_dtype(9)), "synthetic")
    began = time.process_time()
    index = open_index(tmp_path)
    assert time.process_time() - began < 0.3
    assert index.num_samples == count


def test_an_index_names_all_of_its_classes_or_none(small: Index) -> None:
    content = (small.classes, small.shards, np.array(small.members), "x")
    write_index(small.folder, *content, extra={"class_names": ["an ant"]})
    with pytest.raises(DataError, match=r"index\.json: names 1 of its 2 classes"):
        open_index(small.folder)
