"""ImageNet as it is downloaded: nested class tars, the flat validation tar with its ground truth, odd files."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.images.decode import decode
from orchestrator.data.index import Index, open_index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.stream import EvalStream
from orchestrator.data.packing.labels import Labelling
from orchestrator.data.packing.pack import pack
from orchestrator.data.reader import ShardReader
from orchestrator.data.verify import problems
from orchestrator.errors import DataError
from tests.conftest import TEST_DATA, Command
from tests.data.conftest import Files, encoded, noise, tar_bytes, write_tar
from tests.data.packing.ilsvrc import GROUND_TRUTH, devkit, meta_mat, train_tar, val_tar

# The devkit's numbers are not in the order of the ids, and inner nodes of WordNet have numbers too.
SYNSETS = [(1, "n03", "kit fox", 0), (2, "n01", "tench", 0), (3, "n02", "hen", 0), (4, "n00", "entity", 3)]
IDS = ["n01", "n02", "n03"]
VAL_NUMBERS = [3, 1, 2, 2, 3, 1, 1]
VAL_IDS = ["n02", "n03", "n01", "n01", "n02", "n03", "n03"]


def odd_files() -> Files:
    """What real sets hold beside plain RGB JPEG."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return [
        ("cmyk.JPEG", encoded(noise(1), "JPEG", mode="CMYK")),
        ("gray.JPEG", encoded(noise(2, channels=1), "JPEG")),
        ("png.JPEG", encoded(noise(3))),
        ("rotated.JPEG", encoded(noise(4, width=12, height=6), "JPEG", exif=rotated)),
        ("deep.JPEG", encoded(noise(5, channels=1).astype(np.uint16) * 256 + 7)),
    ]


@pytest.fixture
def classes() -> dict[str, Files]:
    made = {
        wnid: [(f"{wnid}_{i}.JPEG", encoded(noise(10 * i + int(wnid[1:])), "JPEG")) for i in range(4)] for wnid in IDS
    }
    made["n02"] += [(f"n02_{name}", data) for name, data in odd_files()]
    return made


@pytest.fixture
def val_images() -> list[bytes]:
    return [encoded(noise(100 + i), "JPEG") for i in range(len(VAL_NUMBERS))]


def contents(index: Index) -> Counter[tuple[str, bytes]]:
    """How often each (class, bytes) is there."""
    reader = ShardReader(index)
    return Counter((index.classes[index.labels[i]], reader.read(i)[2]) for i in range(index.num_samples))


def test_the_nested_train_tar_packs_as_the_unpacked_folders_do(classes: dict[str, Files], tmp_path: Path) -> None:
    nested = pack(train_tar(tmp_path / "train.tar", classes), tmp_path / "nested", shard_bytes=9000)
    flat = [(f"{wnid}/{name}", data) for wnid, files in classes.items() for name, data in files]
    folders = pack(write_tar(tmp_path / "folders.tar", flat), tmp_path / "folders", shard_bytes=9000)
    tars = tmp_path / "tars"
    tars.mkdir()
    for wnid, files in classes.items():
        write_tar(tars / f"{wnid}.tar", files)
    assert nested.classes == tuple(IDS)
    assert contents(nested) == Counter((wnid, data) for wnid, files in classes.items() for _, data in files)
    assert nested.sha256 == folders.sha256 == pack(tars, tmp_path / "of-tars", shard_bytes=9000).sha256
    assert problems(nested) == []


def test_odd_files_come_out_of_the_stream_as_pillow_shows_them(classes: dict[str, Files], tmp_path: Path) -> None:
    index = pack(train_tar(tmp_path / "train.tar", classes), tmp_path / "train")
    source = ImageSource(index, image_size=6, channels=3)
    shown = {}
    for batch in EvalStream(source, np.arange(index.num_samples), 4):
        assert not batch.skipped
        for i, image_CHW in zip(batch.indices.tolist(), batch.images.numpy(), strict=True):
            shown[ShardReader(index).read(i)[2]] = image_CHW.transpose(1, 2, 0)
    for name, data in odd_files():
        assert np.array_equal(shown[data], decode(data, image_size=6, channels=3)), name
    deep = shown[odd_files()[4][1]].astype(int)
    reference = Image.fromarray(noise(5, channels=1)).resize((6, 6), Image.Resampling.BILINEAR, box=(1, 0, 8, 7))
    assert np.array_equal(deep[:, :, 0], np.asarray(reference)), "16 bit keep their upper 8"


def test_ground_truth_in_all_its_forms_gives_the_same_set(val_images: list[bytes], tmp_path: Path) -> None:
    source = val_tar(tmp_path / "val.tar", val_images)
    files = {"ids.txt": "\n".join(VAL_IDS) + "\n", "numbers.txt": "".join(f"{n}\n" for n in VAL_NUMBERS)}
    files["map.txt"] = "".join(f"{wnid} {number} {words.replace(' ', '_')}\n" for number, wnid, words, _ in SYNSETS)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "meta.mat").write_bytes(meta_mat(SYNSETS))
    kit = devkit(tmp_path / "devkit.tar.gz", SYNSETS, VAL_NUMBERS)
    with tarfile.open(kit) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    forms = [
        Labelling(tmp_path / "ids.txt"),
        Labelling(tmp_path / "numbers.txt", tmp_path / "meta.mat"),
        Labelling(tmp_path / "numbers.txt", tmp_path / "map.txt"),
        Labelling(kit),
        Labelling(tmp_path / "unpacked" / "ILSVRC2012_devkit_t12"),
    ]
    expected = Counter(zip(VAL_IDS, val_images, strict=True))
    for number, labelling in enumerate(forms):
        index = pack(source, tmp_path / str(number), labelling=labelling)
        assert index.classes == tuple(IDS)
        assert contents(index) == expected
        names = {"n01": "tench", "n02": "hen", "n03": "kit fox"}
        assert index.class_names == (names if number else {})
        assert problems(index) == []


def test_unsorted_images_may_lie_in_a_folder_and_in_any_order(val_images: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("\n".join(VAL_IDS))
    files = [(f"val/{i}.JPEG", image) for i, image in enumerate(val_images)]
    tar = pack(write_tar(tmp_path / "x.tar", files[::-1]), tmp_path / "a", labelling=Labelling(tmp_path / "ids.txt"))
    (tmp_path / "images" / "val").mkdir(parents=True)
    for name, image in files:
        (tmp_path / "images" / name).write_bytes(image)
    (tmp_path / "images" / "notes.txt").touch()
    for folder in ("images", "images/val"):
        index = pack(tmp_path / folder, tmp_path / "b" / folder, labelling=Labelling(tmp_path / "ids.txt"))
        assert contents(index) == contents(tar) == Counter(zip(VAL_IDS, val_images, strict=True))


def test_train_and_validation_share_one_class_list(
    classes: dict[str, Files], val_images: list[bytes], tmp_path: Path, in_process: Command
) -> None:
    (tmp_path / "names.txt").write_text("n01 tench, Tinca tinca\nn02\then\nn03 kit fox\nn04 not used\n")
    (tmp_path / "ids.txt").write_text("\n".join(["n01"] * 7))
    train, val = train_tar(tmp_path / "train.tar", classes), val_tar(tmp_path / "val.tar", val_images)
    names = ("--class-names", tmp_path / "names.txt")
    assert in_process("data", "pack", train, tmp_path / "train", *names).returncode == 0
    options = ("--labels", tmp_path / "ids.txt", "--classes", tmp_path / "train", "--jobs", "1")
    done = in_process("data", "pack", val, tmp_path / "val", *options)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    index = open_index(tmp_path / "val")
    assert index.classes == tuple(IDS)
    assert set(index.labels.tolist()) == {0}
    assert index.class_names["n01"] == "tench, Tinca tinca"


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"l": "n01\n" * 6}, {"labels": "l"}, r"val\.tar: has 7 images, the list of labels has 6; they must agree"),
        ({"l": "n01\n" * 8}, {"labels": "l"}, r"val\.tar: has 7 images, the list of labels has 8"),
        ({"l": ""}, {"labels": "l"}, r"l: is empty"),
        ({}, {"labels": "l"}, r"l: .*No such file"),
        ({"l": "\udcff"}, {"labels": "l"}, r"l: cannot be read as text"),
        ({"l": "n01\n\nn02\n"}, {"labels": "l"}, r"l:2: expected one WordNet id or number, got ''"),
        ({"l": "n01 7\n"}, {"labels": "l"}, r"l:1: expected one WordNet id or number, got 'n01 7'"),
        ({"l": "1\n" * 7}, {"labels": "l"}, r"l: states numbers \(1 \.\.\.\): say what they mean with --synsets"),
        ({"l": "9\n" * 7, "s": "n01 1\n"}, {"labels": "l", "synsets": "s"}, r"l:1: '9' is none of the 1 numbers"),
        ({"l": "1\n" * 7, "s": "n01\nn02\n"}, {"labels": "l", "synsets": "s"}, r"s:1: expected `WNID NUMBER"),
        ({"l": "1\n" * 7, "s.mat": "x"}, {"labels": "l", "synsets": "s.mat"}, r"s\.mat: is not the devkit's meta\.mat"),
        ({"l": "n01\n" * 7, "s": "n01 1"}, {"labels": "l", "synsets": "s"}, r"s: --synsets explains numbers, but"),
        ({"s": "n01 1"}, {"synsets": "s"}, r"s: --synsets explains the numbers of --labels FILE, which is not given"),
        ({"l": "n01\n" * 7, "n": "n02 hen"}, {"labels": "l", "class_names": "n"}, r"n: has no name for 1 .*: n01"),
        ({"l": "n01\n" * 7, "n": "n02"}, {"labels": "l", "class_names": "n"}, r"n:1: expected `CLASS NAME`, got 'n02'"),
        ({"l": "n01\n" * 6 + "n77"}, {"labels": "l", "classes": "train"}, r"l: 1 classes are not among the 3 .*: n77"),
        ({"l": "n01\n" * 7}, {"labels": "l", "classes": "."}, r"no index\.json there"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_one_clear_error(
    classes: dict[str, Files],
    val_images: list[bytes],
    tmp_path: Path,
    files: dict[str, str],
    options: dict[str, str],
    message: str,
) -> None:
    source = val_tar(tmp_path / "val.tar", val_images)
    pack(train_tar(tmp_path / "train.tar", classes), tmp_path / "train")
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        pack(source, tmp_path / "out", labelling=Labelling(**{k: tmp_path / v for k, v in options.items()}))
    assert caught.value.exit_code == 3
    assert not [path for path in tmp_path.iterdir() if "out" in path.name], "nothing is left behind"


def test_an_inner_node_of_wordnet_is_no_class(val_images: list[bytes], tmp_path: Path) -> None:
    kit = devkit(tmp_path / "devkit.tar.gz", SYNSETS, [1, 4, 2, 2, 3, 1, 1])
    with pytest.raises(DataError, match=r"devkit\.tar\.gz:2: '4' is none of the 3 numbers of the synset list"):
        pack(val_tar(tmp_path / "val.tar", val_images), tmp_path / "out", labelling=Labelling(kit))


def test_a_devkit_without_its_files_is_named(val_images: list[bytes], tmp_path: Path) -> None:
    source = val_tar(tmp_path / "val.tar", val_images)
    kit = write_tar(tmp_path / "devkit.tar", [("data/meta.mat", meta_mat(SYNSETS))])
    with pytest.raises(DataError, match=rf"devkit\.tar: is no ILSVRC2012 devkit: {GROUND_TRUTH} is missing"):
        pack(source, tmp_path / "out", labelling=Labelling(kit))


def test_a_cut_class_tar_inside_a_whole_train_tar_is_named(classes: dict[str, Files], tmp_path: Path) -> None:
    inner = {f"{wnid}.tar": tar_bytes(files) for wnid, files in classes.items()}
    whole = inner["n02.tar"]
    used = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, used + 1, 512):
        inner["n02.tar"] = whole[:length]
        source = write_tar(tmp_path / "train.tar", list(inner.items()))
        with pytest.raises(DataError, match=r"train\.tar: n02\.tar: (is damaged or cut|is not a tar)"):
            pack(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("n01.tar", "tar"), ("x/n01.tar", "tar")], r"n01\.tar: a class tar of this name is there twice"),
        (
            [("n01.tar", "tar"), ("a/1.JPEG", "image")],
            r"holds class tars \(n01\.tar .*\) and images too \(a/1\.JPEG",
        ),
        ([("n01.tar", "image")], r"n01\.tar: is not a tar that can be read"),
        ([("n01.tar", "empty")], r"n01\.tar: a class tar without JPEG or PNG images"),
        ([("1.JPEG", "image")], r"1 images have no class; list theirs with --labels"),
        ([("1.jpg", "image"), ("1.cls", "label")], r"no class; it is a WebDataset shard: orchestrator data index"),
        ([("n01.tar", "shard")], r"n01\.tar: is a WebDataset shard, no class tar"),
        ([("notes.txt", "label")], r"no JPEG or PNG images in class folders"),
    ],
)
def test_what_is_none_of_the_known_forms_is_one_clear_error(
    members: list[tuple[str, str]], message: str, tmp_path: Path
) -> None:
    image = encoded(noise(1), "JPEG")
    content = {
        "tar": tar_bytes([("1.JPEG", image)]),
        "image": image,
        "label": b"3",
        "empty": tar_bytes([("notes.txt", b"x")]),
        "shard": tar_bytes([("1.jpg", image), ("1.cls", b"3")]),
    }
    source = write_tar(tmp_path / "x.tar", [(name, content[kind]) for name, kind in members])
    with pytest.raises(DataError, match=message):
        pack(source, tmp_path / "out")


def test_labels_for_a_source_that_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("n01\n")
    with pytest.raises(DataError, match="digits: has its own classes"):
        pack("digits", tmp_path / "out", labelling=Labelling(tmp_path / "l"))


@pytest.mark.skipif(not (TEST_DATA / "imagenet-samples200.tar").exists(), reason="photographs are not there")
def test_real_photographs_laid_out_as_the_real_tars(tmp_path: Path) -> None:
    with tarfile.open(TEST_DATA / "imagenet-samples200.tar") as tar:
        photos = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
    nested: dict[str, Files] = {}
    for name, data in photos.items():
        nested.setdefault(name.split("/")[0], []).append((name.split("/")[1], data))
    first = min(nested)
    nested[first] += odd_files()
    train = pack(train_tar(tmp_path / "train.tar", nested), tmp_path / "train", shard_bytes=4_000_000)
    assert (train.num_samples, len(train.classes)) == (205, 200)
    synsets = [(i, wnid, wnid, 0) for i, wnid in enumerate(sorted(nested, key=lambda w: w[::-1]), start=1)]
    numbers = {wnid: number for number, wnid, _, _ in synsets}
    kit = devkit(tmp_path / "devkit.tar.gz", synsets, [numbers[name.split("/")[0]] for name in photos])
    val = pack(
        val_tar(tmp_path / "val.tar", list(photos.values())),
        tmp_path / "val",
        labelling=Labelling(kit, classes=tmp_path / "train"),
        shard_bytes=4_000_000,
    )
    assert val.classes == train.classes
    assert contents(val) == Counter((name.split("/")[0], data) for name, data in photos.items())
    assert contents(train) == contents(val) + Counter((first, data) for _, data in odd_files())
    for index in (train, val):
        assert problems(index) == []
        batches = list(EvalStream(ImageSource(index, image_size=32, channels=3), np.arange(index.num_samples), 64))
        assert sum(len(batch.indices) for batch in batches) == index.num_samples
