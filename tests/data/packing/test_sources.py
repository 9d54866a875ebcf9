"""What `pack` makes of sources as people have them: damaged, nested, linked, half packed."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import command
from orchestrator.data.index import Index, open_index
from orchestrator.data.packing.pack import pack
from orchestrator.data.verify import problems
from orchestrator.errors import DataError, JobError
from tests.conftest import TEST_DATA, Command
from tests.data.conftest import encoded, noise, write_tar

Files = list[tuple[str, bytes]]


def unpacked(files: Files, root: Path) -> Path:
    for name, content in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_a_cut_source_is_never_packed_in_part(images: Files, tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", images).read_bytes()
    end_of_images = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, end_of_images + 1, 512):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar: "):
            pack(cut, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_source_with_a_damaged_header_is_never_packed_in_part(images: Files, tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", images).read_bytes()
    headers = [whole.index(name.encode()) for name, _ in images]
    for at in headers:
        damaged = bytearray(whole)
        damaged[at + 2] ^= 1
        source = tmp_path / "damaged.tar"
        source.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged\.tar: is (damaged or cut at byte|not a tar)"):
            pack(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("pattern", "classes"),
    [
        ("{0}/{1}", ("a", "b")),
        ("./{0}/{1}", ("a", "b")),
        ("set/train/{0}/{1}", ("a", "b")),
        ("train/{0}/images/{1}", ("a", "b")),
        ("set/{0}/{1}/{1}", ("a", "b")),
    ],
)
def test_the_class_is_the_first_folder_in_which_paths_of_a_tar_differ(
    images: Files, tmp_path: Path, pattern: str, classes: tuple[str, ...]
) -> None:
    named = [(pattern.format(*name.split("/")), content) for name, content in images]
    index = pack(write_tar(tmp_path / "x.tar", named), tmp_path / "x")
    assert (index.classes, index.num_samples) == (classes, 12)
    assert np.bincount(index.labels).tolist() == [6, 6]


def test_a_tar_and_its_unpacked_folder_agree_also_when_nested(images: Files, tmp_path: Path) -> None:
    nested = [(name.replace("/", f"/{i % 3}-x/", 1), content) for i, (name, content) in enumerate(images)]
    nested += [("b/plain.png", images[0][1]), ("b/0.png", images[1][1])]
    tar = pack(write_tar(tmp_path / "x.tar", [(f"top/{n}", c) for n, c in nested]), tmp_path / "from-tar")
    folder = pack(unpacked(nested, tmp_path / "top"), tmp_path / "from-folder")
    assert tar.sha256 == folder.sha256


def test_what_is_no_image_in_a_class_folder_is_ignored_and_counted(images: Files, tmp_path: Path) -> None:
    rubbish = [("a/notes.txt", b"x"), ("a/._0.png", b"x"), ("__MACOSX/a/0.png", b"x"), ("README", b"x")]
    stray = [("stray.png", images[0][1])]
    folder = pack(unpacked(images + rubbish + stray, tmp_path / "top"), tmp_path / "from-folder")
    named = [(f"top/{name}", content) for name, content in images + rubbish + stray]
    tar = pack(write_tar(tmp_path / "x.tar", named), tmp_path / "from-tar")
    assert (folder.num_samples, folder.ignored) == (tar.num_samples, tar.ignored) == (12, 5)
    assert folder.classes == tar.classes == ("a", "b")


def test_class_folders_may_be_links_and_a_broken_link_is_named(images: Files, tmp_path: Path) -> None:
    real = unpacked(images, tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for label in "ab":
        (linked / label).symlink_to(real / label)
    assert pack(linked, tmp_path / "x").sha256 == pack(real, tmp_path / "y").sha256
    (real / "a" / "broken.png").symlink_to("/nowhere")
    with pytest.raises(DataError, match=r"broken\.png: a link to nothing"):
        pack(real, tmp_path / "z")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read_is_named(images: Files, tmp_path: Path) -> None:
    root = unpacked(images, tmp_path / "top")
    (root / "a").chmod(0)
    with pytest.raises(DataError, match=r"top/a: cannot be read: Permission denied"):
        pack(root, tmp_path / "x")
    (root / "a").chmod(0o755)


def test_names_that_point_out_of_the_archive_write_nothing_there(images: Files, tmp_path: Path) -> None:
    climbing = write_tar(tmp_path / "x.tar", [(f"../../{name}", content) for name, content in images])
    with pytest.raises(DataError, match="no JPEG or PNG images in class folders"):
        pack(climbing, tmp_path / "out")
    absolute = write_tar(tmp_path / "y.tar", [(f"{tmp_path}/elsewhere/{name}", c) for name, c in images])
    index = pack(absolute, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"x.tar", "y.tar", "out"}
    assert sorted(path.name for path in index.folder.iterdir()) == [
        "index.json",
        "members.npy",
        "names.txt",
        "shard-000000.tar",
    ]


def test_progress_counts_up_to_the_number_of_images(images: Files, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    pack(write_tar(tmp_path / "x.tar", images), tmp_path / "x", progress=lambda *call: calls.append(call))
    assert calls == [(i, 12) for i in range(13)]


def test_who_packs_the_same_meanwhile_waits_and_gets_it(images: Files, small: Index, tmp_path: Path) -> None:
    source, out = write_tar(tmp_path / "small.tar", images), tmp_path / "out"
    told: list[str] = []

    def second() -> Index:
        return pack(source, out, shard_bytes=6000, say=told.append)

    with ThreadPoolExecutor(1) as pool:
        later: list[Future[Index]] = []

        def begin_second(done: int, total: int) -> None:
            if done == 1:
                later.append(pool.submit(second))
            while done == total and not told:
                time.sleep(0.01)

        first = pack(source, out, shard_bytes=6000, progress=begin_second)
        assert later[0].result(10).sha256 == first.sha256 == small.sha256
    assert told == [f"{out}: is being packed already; waiting"]


def test_a_folder_that_somebody_fills_meanwhile_stays_as_it_is(images: Files, tmp_path: Path) -> None:
    def somebody_else_is_there(done: int, total: int) -> None:
        (tmp_path / "taken").mkdir(exist_ok=True)
        (tmp_path / "taken" / "file").touch()

    source = write_tar(tmp_path / "small.tar", images)
    with pytest.raises(DataError, match="taken: the shards cannot be put there"):
        pack(source, tmp_path / "taken", progress=somebody_else_is_there)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]


def test_packing_into_a_finished_folder_says_so_and_another_source_is_refused(
    images: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tar(tmp_path / "x.tar", images)
    assert command.pack(str(source), tmp_path / "x") == 0
    assert command.pack(str(source), tmp_path / "x") == 0
    assert "holds packed data already: 12 images, 2 classes" in capsys.readouterr().out
    with pytest.raises(JobError, match=r"holds data packed from 'x\.tar' already, not from 'digits'"):
        command.pack("digits", tmp_path / "x")
    assert open_index(tmp_path / "x").num_samples == 12


def test_the_parts_of_a_data_set_are_no_classes(images: Files, tmp_path: Path, in_process: Command) -> None:
    parts = [(f"{part}/{name}", content) for part in ("val", "train") for name, content in images]
    root, out = unpacked(parts, tmp_path / "pics"), tmp_path / "out"
    done = in_process("data", "pack", root, out)
    assert done.returncode == 3
    assert done.stderr == (
        f"{root}: classes would be train, val: pack each by itself: orchestrator data pack {root}/train OUT-train, "
        f"then orchestrator data pack {root}/val OUT-val --classes OUT-train\n"
    )
    with pytest.raises(DataError, match=r"x\.tar: classes would be train, val: unpack it and pack each by itself"):
        pack(write_tar(tmp_path / "x.tar", parts), out)
    assert not out.exists()
    done = in_process("data", "pack", root / "train", out)
    assert done.returncode == 0 and "; classes: a, b\n" in done.stdout
    vehicles = unpacked([(name.replace("a/", "train/"), content) for name, content in images], tmp_path / "vehicles")
    assert pack(vehicles, tmp_path / "kept").classes == ("b", "train")


def test_packing_with_other_options_into_a_finished_folder_is_refused(
    images: Files, tmp_path: Path, in_process: Command
) -> None:
    source, out = write_tar(tmp_path / "x.tar", images), tmp_path / "x"
    other = pack(unpacked([(f"c{name}", data) for name, data in images], tmp_path / "y"), tmp_path / "other").folder
    assert in_process("data", "pack", source, out, "--max-side", "8").returncode == 0
    for flags in ([], ["--max-side", "8"], ["--jobs", "1"], ["--classes", out]):
        assert in_process("data", "pack", source, out, *flags).returncode == 0
    for flag, value, said in (
        ("--max-side", "6", "--max-side 8, not 6"),
        ("--quality", "50", "--quality not given, not 50"),
        ("--shard-size", "1", "--shard-size not given, not 1"),
        ("--classes", other, f"not with the classes of {other}"),
    ):
        done = in_process("data", "pack", source, out, flag, value)
        assert done.returncode == 2
        assert done.stderr == f"{out}: holds data packed already, {said}; remove it or choose another folder\n"


def test_classes_of_the_other_set_without_an_image_in_this_one_are_named(tmp_path: Path, in_process: Command) -> None:
    def packed(labels: str, *words: object) -> str:
        files = [(f"{label}/{i}.png", encoded(noise(i))) for label in labels for i in range(2)]
        done = in_process("data", "pack", write_tar(tmp_path / f"{labels}.tar", files), tmp_path / labels, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "no images of" not in packed("abc")
    assert "  no images of 1 class: c\n" in packed("ab", "--classes", tmp_path / "abc")
    assert "  no images of 2 classes: a, c\n" in packed("b", "--classes", tmp_path / "abc")


@pytest.mark.parametrize("place", ["x", "deep/x"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, in_process: Command, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / place
    done = in_process("data", "pack", "digits", out)
    assert done.returncode == 2
    assert done.stderr == f"{out}: cannot be written: a part of its path is a file; choose another OUT\n"


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="a folder of Linux in which nobody makes files")
def test_a_place_that_not_even_root_may_write_is_named(in_process: Command) -> None:
    done = in_process("data", "pack", "digits", "/sys/mine")
    assert done.returncode == 2
    assert re.fullmatch(r"/sys/mine: cannot be written: [A-Z][a-z -]+; choose another OUT\n", done.stderr)


@pytest.mark.parametrize(
    ("name", "count"),
    [("mnist-test.tar.gz", 10_000), pytest.param("cifar10-train.tar.gz", 50_000, marks=pytest.mark.slow)],
)
def test_real_archives_pack(tmp_path: Path, name: str, count: int) -> None:
    if not (TEST_DATA / name).exists():
        pytest.skip(f"{name} is not there")
    index = pack(TEST_DATA / name, tmp_path / "real")
    assert (index.num_samples, len(index.classes)) == (count, 10)


@pytest.mark.slow
def test_real_digits_verify(tmp_path: Path) -> None:
    if not (TEST_DATA / "mnist-test.tar.gz").exists():
        pytest.skip("mnist-test.tar.gz is not there")
    assert problems(pack(TEST_DATA / "mnist-test.tar.gz", tmp_path / "mnist")) == []
