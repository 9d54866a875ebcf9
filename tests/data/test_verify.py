"""`data verify` finds what training would not look at."""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path

import numpy as np

from orchestrator.data.index import Index, Shard, file_sha256, open_index, write_index
from orchestrator.data.names import source_names
from orchestrator.data.packing.pack import pack
from orchestrator.data.verify import problems
from tests.data.conftest import PNG_END, encoded, noise, write_tar


def restated(index: Index, members: np.ndarray | None = None) -> Index:
    """The index written anew, with hashes of the shards as they lie there."""
    members = np.array(index.members if members is None else members)  # the file under the memory map changes
    shards = []
    for shard in index.shards:
        path = index.folder / shard.name
        shards.append(Shard(shard.name, path.stat().st_size, file_sha256(path), shard.samples))
    write_index(index.folder, index.classes, shards, members, "test")
    return open_index(index.folder)


def test_what_was_packed_is_right_and_counted(small: Index) -> None:
    calls: list[tuple[int, int]] = []
    assert problems(small, progress=lambda *call: calls.append(call)) == []
    borders = np.cumsum([0, *(shard.samples for shard in small.shards)]).tolist()
    assert calls == [(done, 12) for done in borders]


def test_a_label_in_the_index_that_is_not_the_one_in_the_shard(small: Index) -> None:
    members = np.array(small.members)
    right = int(members["label"][3])
    members["label"][3] = 1 - right
    (problem,) = problems(restated(small, members))
    assert f"key 000000003: the shard says class {right}, the index {1 - right}" in problem.text


def test_a_member_table_that_changed_after_it_was_opened(small: Index) -> None:
    with open(small.folder / "members.npy", "r+b") as table:
        table.seek(-1, 2)
        table.write(b"\x07")
    assert any("the member table is not the one that index.json states" in problem.text for problem in problems(small))


def test_members_that_are_missing_or_doubled(small: Index) -> None:
    path = small.folder / small.shards[0].name
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    write_tar(path, [*members, ("extra.cls", b"0")])
    doubled = restated(small)
    assert [problem.text for problem in problems(doubled)] == [
        f"{path}: key extra: has no image (one of .jpg, .png, .jpeg)"
    ]
    write_tar(path, [m for m in members if m[0] != "000000001.cls"])
    found = problems(restated(doubled))
    (name,) = source_names(small, ["000000001"]).values()
    expected = f"{path}: key 000000001: has no class (member .cls) (packed from {name})"
    assert expected in [problem.text for problem in found]


def test_a_key_that_is_there_twice(small: Index) -> None:
    members = np.array(small.members)
    members["key"][5] = members["key"][4]
    found = problems(dataclasses.replace(small, members=members))
    assert any("key 000000004 is there twice" in problem.text for problem in found)


def test_a_missing_shard_is_one_line(small: Index) -> None:
    path = small.folder / small.shards[1].name
    path.unlink()
    assert [problem.text for problem in problems(small)] == [f"{path}: cannot be read: No such file or directory"]


def test_an_image_that_was_damaged_before_packing(tmp_path: Path) -> None:
    files = [("a/0.png", encoded(noise(0))), ("b/0.png", encoded(noise(1))[:60] + PNG_END)]
    index = pack(write_tar(tmp_path / "x.tar", files), tmp_path / "x")
    assert problems(index) == [], "the bytes are those of the source"
    (problem,) = problems(index, decode=True)
    assert problem.text.startswith(f"{index.folder / index.shards[0].name}: key 00000000")
