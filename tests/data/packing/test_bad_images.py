"""Images of a source that cannot be packed: all are named at once, or left out and stated."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestrator.data.index import Index, open_index
from orchestrator.data.packing.pack import pack
from orchestrator.data.packing.reencode import Encoding
from orchestrator.data.reader import ShardReader
from orchestrator.data.verify import problems
from orchestrator.errors import DataError
from tests.conftest import Command
from tests.data.conftest import Files, encoded, noise, write_tar

JPEG = encoded(noise(0, 80, 60), "JPEG")
PNG = encoded(noise(1, 80, 60))
BAD = [
    ("a/page.jpg", b"<html>404</html>", "neither JPEG nor PNG by its first bytes"),
    ("a/empty.png", b"", "empty file"),
    ("b/cut.jpg", JPEG[: len(JPEG) // 2], "cut off or damaged: OSError: image file is truncated"),
    ("b/cut.png", PNG[:-200], "cut off or damaged: OSError: image file is truncated"),
]


@pytest.fixture
def good() -> Files:
    return [(f"{label}/{i:02d}.png", encoded(noise(10 * i + ord(label)))) for label in "ab" for i in range(30)]


@pytest.fixture
def folder(good: Files, tmp_path: Path) -> Path:
    """Sixty good images and all kinds of bad ones."""
    root = tmp_path / "source"
    for name, content in [*good, *((name, content) for name, content, _ in BAD)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "a" / "gone.jpg").symlink_to("/nowhere")
    return root


def contents(index: Index) -> list[bytes]:
    return sorted(ShardReader(index).read(i)[2] for i in range(index.num_samples))


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_bad_images_of_a_source_are_named_at_once_with_their_paths(folder: Path, tmp_path: Path, jobs: int) -> None:
    with pytest.raises(DataError) as caught:
        pack(folder, tmp_path / "out", shard_bytes=20_000, jobs=jobs)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{folder}: 5 of 65 images cannot be packed:"
    assert lines[-1] == ("repair or remove them, or leave them out: the same command with --skip-bad goes on from here")
    told = dict(line.strip().split(": ", 1) for line in lines[1:-1])
    assert list(told) == sorted(told) == sorted(f"{folder}/{name}" for name in [*(b[0] for b in BAD), "a/gone.jpg"])
    for name, _, why in BAD:
        assert told[f"{folder}/{name}"].startswith(why)
    assert told[f"{folder}/a/gone.jpg"].startswith("a link to nothing")
    assert not (tmp_path / "out").exists()


def test_skipping_goes_on_with_what_was_packed_before_and_states_what_is_missing(
    good: Files, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        pack(folder, tmp_path / "out", shard_bytes=20_000)
    calls: list[tuple[int, int]] = []
    index = pack(folder, tmp_path / "out", shard_bytes=20_000, skip_bad=True, progress=lambda *call: calls.append(call))
    assert calls == [(65, 65)], "no image is read a second time"
    assert len(index.shards) > 1
    assert contents(index) == sorted(content for _, content in good)
    assert problems(index, decode=True) == []
    assert len(index.left_out) == 5
    assert [path.name for path in tmp_path.glob(".*")] == []
    at_once = pack(folder, tmp_path / "at-once", shard_bytes=20_000, jobs=2, skip_bad=True)
    assert (at_once.sha256, at_once.left_out) == (index.sha256, index.left_out)


def test_a_shard_of_bad_images_alone_is_not_written(good: Files, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "x.tar", [*good, ("a/page.jpg", b"<html>")])
    index = pack(source, tmp_path / "out", shard_bytes=1, skip_bad=True)
    assert (len(index.shards), index.num_samples) == (60, 60)
    assert sorted(path.name for path in index.folder.glob("*.tar")) == [shard.name for shard in index.shards]
    assert contents(index) == sorted(content for _, content in good)
    assert problems(index, decode=True) == []


def test_a_good_source_is_packed_to_the_same_bytes_with_and_without_skipping(good: Files, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "x.tar", good)
    plain, skipping = pack(source, tmp_path / "out"), pack(source, tmp_path / "skipping", skip_bad=True)
    for path in plain.folder.iterdir():
        assert path.read_bytes() == (skipping.folder / path.name).read_bytes()


def test_bytes_behind_the_end_of_an_image_are_no_fault(tmp_path: Path) -> None:
    files = [("a/0.jpg", JPEG + bytes(500)), ("a/1.png", PNG + b"notes" * 99)]
    index = pack(write_tar(tmp_path / "x.tar", files), tmp_path / "out")
    assert contents(index) == sorted(content for _, content in files)
    assert problems(index, decode=True) == []


def test_more_than_a_tenth_is_not_skipped(good: Files, tmp_path: Path) -> None:
    pages = [(f"a/page-{i:02d}.jpg", b"<html>") for i in range(30)]
    source = write_tar(tmp_path / "x.tar", [*good, *pages])
    for skip_bad, end in ((True, "; --skip-bad leaves out at most 10 % of a source"), (False, "repair or remove them")):
        with pytest.raises(DataError) as caught:
            pack(source, tmp_path / "out", skip_bad=skip_bad)
        lines = str(caught.value).splitlines()
        assert lines[0] == f"{source}: 30 of 90 images cannot be packed:"
        assert lines[1] == f"  {source}: a/page-00.jpg: neither JPEG nor PNG by its first bytes"
        assert lines[21] == "  ... and 10 more"
        assert len(lines) == 23
        assert lines[-1].endswith(end)


def test_a_class_is_not_lost_by_skipping(good: Files, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "x.tar", [*good, ("c/page.jpg", b"<html>")])
    with pytest.raises(DataError, match="--skip-bad leaves no image of class c; remove the class"):
        pack(source, tmp_path / "out", skip_bad=True)


def test_an_image_that_cannot_be_made_smaller_is_one_of_them(good: Files, tmp_path: Path) -> None:
    headless = JPEG[:3] + JPEG[-99:]
    source = write_tar(tmp_path / "x.tar", [*good, ("b/headless.jpg", headless)])
    with pytest.raises(DataError, match=r"1 of 61 images cannot be packed:\n  .*x\.tar: b/headless\.jpg: "):
        pack(source, tmp_path / "out", encoding=Encoding(max_side=5))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_one_of_them(folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "00.png").chmod(0)
    with pytest.raises(DataError, match=r"6 of 65 .*\n.*a/00\.png: cannot be read: Permission denied"):
        pack(folder, tmp_path / "out")


def test_the_command_says_what_was_left_out_and_so_does_stats(
    in_process: Command, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused = in_process("data", "pack", folder, out)
    assert refused.returncode == 3
    assert refused.stderr.count("\n") >= 7
    assert "read 65 of 65 images" in refused.stderr
    assert "packed" not in refused.stderr.splitlines()[0]
    done = in_process("data", "pack", folder, out, "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert f"{out}: 60 images, 2 classes, 1 shard, " in done.stdout
    assert "MB; no images left to be read; classes: a, b" in done.stdout
    for result in (done, in_process("data", "stats", out)):
        assert "5 images of the source that cannot be packed" in result.stdout
        assert f"  {folder}/b/cut.png: cut off or damaged" in result.stdout
    assert list(json.loads((out / "index.json").read_text())["left_out"]) == list(open_index(out).left_out)
