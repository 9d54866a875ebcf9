"""Shards of other writers: indexed where they lie, read as the webdataset package reads them."""

from __future__ import annotations

import gc
import io
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from orchestrator.data.index import Index, open_index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.stream import EvalStream
from orchestrator.data.packing.in_place import index_in_place
from orchestrator.data.packing.labels import Labelling
from orchestrator.data.packing.scan import split_name
from orchestrator.data.reader import ShardReader
from orchestrator.data.verify import problems
from orchestrator.errors import DataError
from tests.conftest import Command
from tests.data.conftest import Files, encoded, noise, write_tar

LONG = "a-folder-with-a-long-name/" * 4 + "and-a-key-that-is-long-too-so-that-no-header-holds-it"


def by_the_webdataset_package(folder: Path) -> None:
    """Its own writer, with the times of writing and members that we have no use for."""
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=4, verbose=0) as sink:
        for i in range(10):
            kind, suffix = [("JPEG", "jpg"), ("PNG", "png"), ("JPEG", "jpeg")][i % 3]
            image = encoded(noise(i), kind)
            sink.write({"__key__": f"s{i:03d}", suffix: image, "cls": i % 3, "json": {"i": i}, "seg.png": b"mask"})


def by_tarfile(kind: int) -> Callable[[Path], None]:
    """Python's tarfile with float times: PAX headers, or GNU's long names; odd keys."""

    def write(folder: Path) -> None:
        folder.mkdir()
        keys = ["./dotted", "sub/folder/7", "plain", LONG, "Größe" if kind == tarfile.PAX_FORMAT else "size"]
        for number in range(2):
            with tarfile.open(folder / f"x{number}.tar", "w", format=kind) as tar:
                for i, key in enumerate(keys):
                    for suffix, data in (
                        ("JPEG", encoded(noise(i + 10 * number), "JPEG")),
                        ("cls", b" 2\n"),
                        ("pkl", b"x"),
                    ):
                        member = tarfile.TarInfo(f"{key}-{number}.{suffix}")
                        member.size, member.mtime = len(data), 1.5  # type: ignore[assignment]
                        tar.addfile(member, io.BytesIO(data))
                tar.addfile(tarfile.TarInfo("README"))
                tar.addfile(tarfile.TarInfo("__meta.json__"))

    return write


WRITERS = {
    "webdataset": by_the_webdataset_package,
    "pax": by_tarfile(tarfile.PAX_FORMAT),
    "gnu": by_tarfile(tarfile.GNU_FORMAT),
}


def theirs(index: Index) -> list[dict[str, Any]]:
    urls = [str(index.folder / shard.name) for shard in index.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the last shard open
        found = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_we_read_what_the_webdataset_package_reads(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "set")
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    index = index_in_place(tmp_path / "set")
    samples, reader = theirs(index), ShardReader(index)
    assert len(samples) == index.num_samples == 10
    for i, sample in enumerate(samples):
        key, suffix, data = reader.read(i)
        assert (key, data, int(index.labels[i])) == (sample["__key__"], sample[suffix], int(sample["cls"]))
    assert index.classes == ("0", "1", "2")
    assert problems(index, decode=True) == []
    assert sum(len(b.indices) for b in EvalStream(ImageSource(index, image_size=8, channels=3), np.arange(10), 3)) == 10
    assert {path: path.read_bytes() for path in before} == before, "the shards stay as they are"
    assert {path.name for path in (tmp_path / "set").iterdir()} - {p.name for p in before} == {
        "index.json",
        "members.npy",
    }


NAMES = ["a.jpg", "a/b.jpg", "a.b/c.seg.png", "./x.cls", "noext", ".hidden", "__meta.json__", "A.JPG", "a/"]


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_suffixes_are_those_of_the_webdataset_package(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    key, suffix = base_plus_ext(name)
    expected = None if key is None or name == "__meta.json__" else (key, suffix.lower())
    assert split_name(name) == expected
    assert split_name("a/._b.jpg") is None, "what a Mac leaves behind is no sample"


def test_any_number_of_processes_gives_the_same_index(tmp_path: Path) -> None:
    identities = set()
    for jobs in (1, 2):
        WRITERS["pax"](tmp_path / str(jobs))
        identities.add(index_in_place(tmp_path / str(jobs), jobs=jobs).sha256)
    assert len(identities) == 1


def test_classes_and_names_come_from_elsewhere(small: Index, tmp_path: Path) -> None:
    image = encoded(noise(1))
    shard = [("1.png", image), ("1.cls", b"1"), ("2.png", image), ("2.cls", b"0")]
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "x.tar", shard)
    (tmp_path / "names").write_text("a an ant\nb a bee\n")
    index = index_in_place(tmp_path / "set", labelling=Labelling(classes=small.folder, class_names=tmp_path / "names"))
    assert (index.classes, index.class_names) == (("a", "b"), {"a": "an ant", "b": "a bee"})


IMAGE = encoded(noise(1))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", IMAGE)], r"x\.tar: key 1: has no class \(member \.cls\)"),
        ([("1.cls", b"0")], r"x\.tar: key 1: has no image \(one of \.jpg, \.png, \.jpeg\)"),
        ([("1.png", IMAGE), ("1.jpg", IMAGE), ("1.cls", b"0")], r"x\.tar: key 1: has two images, \.jpg is the second"),
        ([("1.png", IMAGE), ("1.PNG", IMAGE), ("1.cls", b"0")], r"x\.tar: key 1: member \.png is there twice"),
        ([("1.png", IMAGE), ("1.cls", b"cat")], r"x\.tar: key 1: member \.cls: expected the number .*, found b'cat'"),
        ([("1.png", IMAGE), ("1.cls", b"-1")], r"x\.tar: key 1: member \.cls: expected the number of a class"),
        ([("1.png", IMAGE), ("1.cls", b"1" * 30)], r"x\.tar: key 1: member \.cls: expected the number of a class"),
        ([("1.png", IMAGE), ("1.cls", b"7")], r"x\.tar: key 1: member \.cls: label 7 is outside of the 2 classes"),
        ([("1.png", IMAGE), ("2.png", IMAGE), ("1.cls", b"0"), ("2.cls", b"0")], r"x\.tar: key 1: has no class"),
        ([("1.png", IMAGE), ("1.cls", b"0")] * 2, r"x\.tar: key 1: member \.png is there twice"),
        (
            [("1.png", IMAGE), ("1.cls", b"0"), ("2.png", IMAGE), ("2.cls", b"0"), ("1.png", IMAGE), ("1.cls", b"0")],
            r"x\.tar: key 1: is there twice, or its members are not neighbours",
        ),
        ([], r"its shards hold no samples"),
    ],
)
def test_what_would_be_half_a_sample_is_one_clear_error(
    members: Files, message: str, small: Index, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_tar(folder / "x.tar", members)
    with pytest.raises(DataError, match=message) as caught:
        index_in_place(folder, labelling=Labelling(classes=small.folder))
    assert caught.value.exit_code == 3
    assert [path.name for path in folder.iterdir()] == ["x.tar"]


def test_a_key_in_two_shards_is_named(tmp_path: Path) -> None:
    for name in ("x.tar", "y.tar"):
        write_tar(tmp_path / name, [("1.png", IMAGE), ("1.cls", b"0")])
    with pytest.raises(DataError, match=r"y\.tar: key 1: is in x\.tar too"):
        index_in_place(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no WebDataset shards \(\*\.tar\) there"),
        ({"x.tar.gz": b"x"}, r"x\.tar\.gz: is compressed"),
        ({"x.tar": b"junk" * 400}, r"x\.tar: is not a tar that can be read"),
        ({"index.json": b"{}"}, r"has an index already; remove"),
    ],
)
def test_a_folder_that_holds_no_shards_is_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        index_in_place(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        index_in_place(tmp_path / "nowhere")


def test_every_cut_of_a_foreign_shard_is_an_error(tmp_path: Path) -> None:
    WRITERS["pax"](tmp_path / "whole")
    data = (tmp_path / "whole" / "x0.tar").read_bytes()
    (tmp_path / "cut").mkdir()
    used = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, used + 1, 512):
        (tmp_path / "cut" / "x.tar").write_bytes(data[:length])
        with pytest.raises(DataError, match=r"x\.tar: "):
            index_in_place(tmp_path / "cut")


def test_the_command_indexes_and_says_what_there_is(tmp_path: Path, in_process: Command) -> None:
    WRITERS["webdataset"](tmp_path / "set")
    done = in_process("data", "index", tmp_path / "set", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert "10 images, 3 classes, 3 shards" in done.stdout
    assert in_process("data", "index", tmp_path / "set").returncode == 3
    assert in_process("data", "verify", tmp_path / "set", "--jobs", "1").returncode == 0
    assert open_index(tmp_path / "set").source == "set"


def test_a_label_that_no_class_can_have_is_damage(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "x.tar", [("1.png", encoded(noise(1))), ("1.cls", b"4294967295")])
    with pytest.raises(DataError, match=r"x\.tar: key 1: member \.cls: label 4294967295 is outside of the 1048576"):
        index_in_place(tmp_path / "set")
