"""Packing and reading: any WebDataset reader reads our shards, and ours believes nothing."""

from __future__ import annotations

import gc
import io
import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from orchestrator.data.images.decode import decode
from orchestrator.data.index import Index, open_index
from orchestrator.data.packing.pack import pack
from orchestrator.data.reader import ShardReader
from orchestrator.data.verify import problems
from orchestrator.errors import DataError
from tests.conftest import TEST_DATA


def image_bytes(seed: int, kind: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Three classes, 4 + 5 + 6 images; one PNG is called .JPEG, and there is rubbish beside them."""
    root = tmp_path / "images"
    for label, count in (("cat", 4), ("ant", 5), ("bee", 6)):
        (root / label).mkdir(parents=True)
        for i in range(count):
            kind = "JPEG" if i % 2 else "PNG"
            (root / label / f"{i}.JPEG").write_bytes(image_bytes(len(label) * 100 + count * 10 + i, kind))
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / "._0.JPEG").write_bytes(b"what a Mac leaves behind")
    return root


@pytest.fixture
def packed(image_folder: Path, tmp_path: Path) -> Index:
    return pack(image_folder, tmp_path / "packed", shard_bytes=8000)


def test_classes_are_the_sorted_folder_names_and_every_image_is_there_once(image_folder: Path, packed: Index) -> None:
    assert packed.classes == ("ant", "bee", "cat")
    assert np.bincount(packed.labels).tolist() == [5, 6, 4]
    reader = ShardReader(packed)
    found = sorted(reader.read(i)[2] for i in range(packed.num_samples))
    assert found == sorted(p.read_bytes() for p in image_folder.glob("*/[0-9]*.JPEG"))
    assert len(packed.shards) > 1


def test_the_webdataset_package_reads_the_same_samples(packed: Index) -> None:
    urls = [str(packed.folder / shard.name) for shard in packed.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the last shard open
        theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    reader = ShardReader(packed)
    assert len(theirs) == packed.num_samples
    for i, sample in enumerate(theirs):
        key, suffix, data = reader.read(i)
        assert sample["__key__"] == key
        assert sample[suffix] == data
        assert int(sample["cls"]) == packed.labels[i]


def test_packing_again_gives_the_same_bytes_also_from_a_tar_of_the_folder(image_folder: Path, tmp_path: Path) -> None:
    first = pack(image_folder, tmp_path / "a")
    for mode, name in (("w", "images.tar"), ("w:gz", "images.tar.gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.add(image_folder, arcname="some/folder")
        again = pack(tmp_path / name, tmp_path / name.replace(".", "-"))
        assert again.sha256 == first.sha256
        for shard in first.shards:
            assert (again.folder / shard.name).read_bytes() == (first.folder / shard.name).read_bytes()


def test_the_embedded_digits_pack_without_any_source(tmp_path: Path) -> None:
    index = pack("digits", tmp_path / "digits")
    assert (index.num_samples, index.classes) == (1797, tuple("0123456789"))
    assert problems(index) == []


def test_the_embedded_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    index, reference = pack("digits", tmp_path / "digits"), load_digits()
    reader = ShardReader(index)
    pixels = [decode(reader.read(i)[2], image_size=8, channels=1) for i in range(index.num_samples)]
    packed = sorted((int(y), np.rint(x * (16 / 255)).tobytes()) for y, x in zip(index.labels, pixels, strict=True))
    assert packed == sorted((int(y), x.tobytes()) for y, x in zip(reference.target, reference.images, strict=True))


def test_a_folder_that_holds_something_is_not_overwritten(image_folder: Path, packed: Index) -> None:
    before = {p: p.read_bytes() for p in packed.folder.iterdir()}
    with pytest.raises(DataError, match="is there already and not empty"):
        pack(image_folder, packed.folder)
    assert {p: p.read_bytes() for p in packed.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nothing", "no such file or folder"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "no JPEG or PNG images in class folders"),
        (
            lambda p: (p / "flat").mkdir() or (p / "flat" / "1.jpg").touch() or p / "flat",
            "; 1 image lies directly in .*flat: put it into a folder named after its class",
        ),
        (
            lambda p: (p / "many").mkdir() or any((p / "many" / n).touch() for n in ("1.jpg", "2.PNG")) or p / "many",
            "; 2 images lie directly in .*many: put each into a folder named after its class",
        ),
        (lambda p: (p / "x.tar").write_bytes(b"junk" * 400) and p / "x.tar", "is not a tar that can be read"),
        (lambda p: (p / "x.tgz").write_bytes(b"\x1f\x8bjunk") and p / "x.tgz", "cannot be unpacked"),
    ],
)
def test_a_source_without_images_is_refused_and_leaves_nothing(tmp_path: Path, make: object, message: str) -> None:
    source = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        pack(source, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_every_truncation_of_a_shard_is_an_error(packed: Index) -> None:
    shard = packed.folder / packed.shards[0].name
    whole = shard.read_bytes()
    samples = np.flatnonzero(packed.members["shard"] == 0)
    for length in range(0, len(whole), 512):
        shard.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"expected {len(whole)} bytes, found {length}"):
            ShardReader(packed).read(int(samples[0]))
    shard.write_bytes(whole)
    assert ShardReader(packed).read(int(samples[0]))


def test_no_flipped_byte_of_a_sample_passes_unseen(packed: Index) -> None:
    row = packed.members[0]
    shard = packed.folder / packed.shards[0].name
    whole = shard.read_bytes()
    start, end = int(row["offset"]) - 512, int(row["offset"]) + int(row["length"])
    dice = np.random.default_rng(0)
    meaningful = [i for i in range(start, start + 512) if whole[i]]
    for at in [*meaningful, *dice.integers(start + 512, end, 60).tolist()]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(dice.integers(8))
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{shard.name}: key 000000000"):
            ShardReader(packed).read(0)
    shard.write_bytes(whole)


def test_a_changed_index_or_member_table_is_refused(packed: Index) -> None:
    file = packed.folder / "index.json"
    text = file.read_text()
    file.write_text(text.replace('"ant"', '"elk"'))
    with pytest.raises(DataError, match="was changed after packing"):
        open_index(packed.folder)
    file.write_text(text)
    table = packed.folder / "members.npy"
    table.write_bytes(table.read_bytes()[:-8])
    with pytest.raises(DataError, match="member table"):
        open_index(packed.folder)


def test_verify_names_a_missing_shard_and_a_damaged_one(packed: Index) -> None:
    assert problems(packed) == []
    first, second = (packed.folder / shard.name for shard in packed.shards[:2])
    first.unlink()
    data = bytearray(second.read_bytes())
    data[700] ^= 1
    second.write_bytes(data)
    found = "\n".join(problem.text for problem in problems(packed))
    assert f"{first}: cannot be read" in found
    assert f"{second}: expected SHA-256" in found


def test_a_missing_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="orchestrator data pack SOURCE"):
        open_index(tmp_path)


def test_reading_keeps_few_files_open(packed: Index) -> None:
    reader = ShardReader(packed)
    before = len(os.listdir("/proc/self/fd"))
    for i in range(packed.num_samples):
        reader.read(i)
    assert len(os.listdir("/proc/self/fd")) - before == len(packed.shards)
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not (TEST_DATA / "cifar10-test.tar.gz").exists(), reason="CIFAR-10 images are not there")
def test_real_images_pack_and_verify(tmp_path: Path) -> None:
    index = pack(TEST_DATA / "cifar10-test.tar.gz", tmp_path / "cifar10-test")
    assert (index.num_samples, len(index.classes)) == (10_000, 10)
    assert np.bincount(index.labels).tolist() == [1000] * 10
