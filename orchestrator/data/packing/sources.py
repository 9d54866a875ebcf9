"""What can be packed: an image folder, a tar of one, a tar of class tars, unsorted images with a list, the digits.

A source is listed first (no image is read) and read item by item afterwards, from any process.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import shutil
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from orchestrator.data.images.decode import BadImage, encode_png
from orchestrator.data.packing.tar_members import Window, members, whole_file
from orchestrator.errors import DataError

DIGITS = "digits"
_IMAGE_NAMES = (".jpg", ".jpeg", ".png")
_NO_FILE = "a link to nothing, or no ordinary file"
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_FORMS = "a folder or tar(.gz) of CLASS/IMAGE, a tar or folder of class tars, unsorted images with --labels, or digits"


@dataclass(frozen=True, slots=True)
class Item:
    """One image: its class, its path in the source, its bytes or where they lie.

    `file` is a tar with the image at `offset`, or the folder that `name` starts from (`offset` -1). `fault` says why
    there are no bytes to be read.
    """

    label: str
    name: str
    file: str
    offset: int
    size: int
    data: bytes | None = None
    fault: str = ""

    def place(self, source: str | Path) -> str:
        """Where the image is, for messages: a path, or its name in `source`."""
        return str(Path(self.file, self.name)) if self.offset < 0 else f"{source}: {self.name}"


@dataclass(frozen=True)
class Found:
    """The images of a source, sorted by class and name, and how many of its files are something else.

    `stamp` changes with the source: its number of bytes and its latest time of change, in ns.
    """

    items: list[Item]
    ignored: int = 0
    stamp: tuple[int, int] = (0, 0)


def read_item(item: Item) -> bytes:
    """The bytes of an image. Raises BadImage for a file that cannot be read, DataError where the source has changed."""
    if item.fault:
        raise BadImage(item.fault)
    if item.data is not None:
        return item.data
    try:
        if item.offset < 0:
            data = Path(item.file, item.name).read_bytes()
        else:
            data = os.pread(_descriptor(item.file), item.size, item.offset)
    except PermissionError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from None
    except OSError as error:
        raise DataError(f"{item.file}: {item.name}: cannot be read: {error.strerror}") from None
    if len(data) != item.size:
        raise DataError(
            f"{item.file}: {item.name}: changed while it was packed: expected {item.size} bytes, found {len(data)}"
        )
    return data


class _Open:
    """An open file that closes with the last one who holds it."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@lru_cache(maxsize=16)
def _opened_file(path: str) -> _Open:
    return _Open(path)


def _descriptor(path: str) -> int:
    return _opened_file(path).descriptor


@contextmanager
def opened(source: str | Path, scratch: Path, labels: Sequence[str] | None = None) -> Iterator[Found]:
    """List a source; a compressed one stays unpacked in `scratch` meanwhile.

    `labels` are the classes of unsorted images, in the order of their names. Raises DataError for what is none of
    the known forms, is damaged, or has another number of images than labels.
    """
    try:
        if source == DIGITS:
            if labels is not None:
                raise DataError("digits: has its own classes; --labels is for unsorted images")
            yield Found(_digits())
            return
        path = Path(source)
        if path.is_dir():
            yield _checked(path, _folder(path, labels), labels)
        elif path.is_file():
            with _plain_tar(path, scratch / "source.tar") as plain:
                yield _checked(path, _tar(path, plain, labels), labels)
        else:
            raise DataError(f"{path}: no such file or folder; SOURCE is {_FORMS}")
    finally:
        _opened_file.cache_clear()


def _checked(path: Path, found: Found, labels: Sequence[str] | None) -> Found:
    if not found.items:
        raise DataError(f"{path}: no JPEG or PNG images in class folders{_loose(path)} (expected {_FORMS})")
    if labels is None:
        _refuse_splits(path, sorted({item.label for item in found.items}))
        return replace(found, items=sorted(found.items, key=lambda item: (item.label, item.name)))
    if len(labels) != len(found.items):
        raise DataError(f"{path}: has {len(found.items)} images, the list of labels has {len(labels)}; they must agree")
    ordered = sorted(found.items, key=lambda item: item.name)
    named = [replace(item, label=label) for item, label in zip(ordered, labels, strict=True)]
    return replace(found, items=sorted(named, key=lambda item: (item.label, item.name)))


def _loose(path: Path) -> str:
    """What to do about images that lie in a folder itself, in words; nothing where there are none."""
    count = sum(_is_image(PurePosixPath(name)) for name in os.listdir(path)) if path.is_dir() else 0
    if not count:
        return ""
    lie, each = ("image lies", "it") if count == 1 else ("images lie", "each")
    return f"; {count} {lie} directly in {path}: put {each} into a folder named after its class"


def _refuse_splits(path: Path, classes: Sequence[str]) -> None:
    """Folders of the parts of a data set are no classes, though they look like them."""
    if not _SPLITS.issuperset(label.lower() for label in classes):
        return
    if not path.is_dir():
        remedy = "unpack it and pack each by itself"
    else:
        sources = [path / label if (path / label).is_dir() else path / f"{label}.tar" for label in classes]
        first = next((i for i, label in enumerate(classes) if label.lower().startswith("train")), 0)
        commands = [f"orchestrator data pack {sources[first]} OUT-{classes[first]}"]
        for label, source in zip(classes, sources, strict=True):
            if label != classes[first]:
                commands.append(f"orchestrator data pack {source} OUT-{label} --classes OUT-{classes[first]}")
        remedy = "pack each by itself: " + ", then ".join(commands)
    raise DataError(f"{path}: classes would be {', '.join(classes)}: {remedy}")


def _digits() -> list[Item]:
    """scikit-learn's 1797 handwritten digits, 8 x 8, as gray PNG (Alpaydin and Kaynak, UCI 1998)."""
    table = np.loadtxt(_digits_file(), delimiter=",", dtype=np.float64)
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    items = []
    for i, (label, image) in enumerate(zip(table[:, -1], pixels, strict=True)):
        data = encode_png(image)
        items.append(Item(f"{label:.0f}", f"{label:.0f}/{i:04d}.png", DIGITS, 0, len(data), data))
    return sorted(items, key=lambda item: (item.label, item.name))


def _digits_file() -> Path:
    """Where scikit-learn keeps them; importing it for this one table would take 4 s."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.submodule_search_locations, "a dependency of this package"
    return Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")


def _is_image(name: PurePosixPath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
    return name.suffix.lower() in _IMAGE_NAMES and not hidden


def _folder(root: Path, labels: Sequence[str] | None) -> Found:
    """Images below class folders; of all folders when there are labels; or of class tars."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    # Class folders may be links. Not Path.rglob: it leaves out folders that it may not read, without a word.
    _, folders, beside = next(os.walk(root, onerror=fail))
    tars = sorted(name for name in beside if name.endswith(".tar") and not name.startswith("."))
    if tars and not folders and labels is None:
        return _folder_of_class_tars(root, tars, len(beside) - len(tars))
    items, changed, size = [], 0, 0
    ignored = 0 if labels is not None else len(beside)
    tops = [("", [("", (), beside)])] if labels is not None else []
    for label, walked in [*tops, *((label, os.walk(root / label, onerror=fail)) for label in folders)]:
        for folder, _, files in walked:
            for path in (Path(folder or root, file) for file in files):
                name = path.relative_to(root)
                if not _is_image(PurePosixPath(name)):
                    ignored += 1
                    continue
                status = _status(path)
                if status is None:
                    items.append(Item(label, name.as_posix(), str(root), -1, 0, fault=_NO_FILE))
                    continue
                changed, size = max(changed, status.st_mtime_ns), size + status.st_size
                items.append(Item(label, name.as_posix(), str(root), -1, status.st_size))
    return Found(items, ignored, (size, changed))


def _status(path: Path) -> os.stat_result | None:
    """What the system says of an ordinary file; None for anything else."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _folder_of_class_tars(root: Path, names: Sequence[str], ignored: int) -> Found:
    items: list[Item] = []
    changed, size = 0, 0
    for name in names:
        path = root / name
        with _reading(path) as descriptor:
            found, others = _class_tar(path, whole_file(descriptor), name, str(path))
        status = path.stat()
        changed, size = max(changed, status.st_mtime_ns), size + status.st_size
        items, ignored = items + found, ignored + others
    return Found(items, ignored, (size, changed))


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    try:
        with open(path, "rb", buffering=0) as file:
            yield file.fileno()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


@contextmanager
def _plain_tar(path: Path, plain: Path) -> Iterator[Path]:
    """A tar that can be read at any place; a compressed one is unpacked first."""
    with _reading(path) as descriptor:
        compressed = os.pread(descriptor, 2, 0) == b"\x1f\x8b"
    if not compressed:
        yield path
        return
    try:
        with gzip.open(path) as source, open(plain, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:  # not OSError: a full disk is no fault of the source
        raise DataError(f"{path}: cannot be unpacked: {error}") from None
    try:
        yield plain
    finally:
        plain.unlink(missing_ok=True)


def _tar(path: Path, plain: Path, labels: Sequence[str] | None) -> Found:
    """Images in class folders of a tar, in class tars inside it, or anywhere when there are labels."""
    items: list[Item] = []
    images: list[tuple[PurePosixPath, int, int]] = []
    ignored = shards = 0
    inner: set[str] = set()
    with _reading(plain) as descriptor:
        window = whole_file(descriptor)
        for member in members(window, str(path)):
            name = PurePosixPath(member.name)
            ordinary = member.isfile() and not member.issparse()
            if ordinary and name.suffix == ".tar" and labels is None:
                if name.stem in inner:
                    raise DataError(f"{path}: {name.name}: a class tar of this name is there twice")
                inner.add(name.stem)
                part = Window(descriptor, member.offset_data, member.size)
                found, others = _class_tar(path, part, str(name), str(plain))
                items, ignored = items + found, ignored + others
            elif ordinary and _is_image(name):
                images.append((name, member.offset_data, member.size))
            elif not member.isdir():
                ignored, shards = ignored + 1, shards + (name.suffix == ".cls")
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    if items and images:
        raise DataError(f"{path}: holds class tars ({min(inner)}.tar ...) and images too ({images[0][0]} ...)")
    if items:
        return Found(items, ignored, stamp)
    if labels is not None:
        return Found([Item("", str(name), str(plain), at, size) for name, at, size in images], ignored, stamp)
    found, stray = _in_class_folders(images, str(plain))
    if stray and not found:
        remedy = "it is a WebDataset shard: orchestrator data index FOLDER" if shards else "list theirs with --labels"
        raise DataError(f"{path}: no JPEG or PNG images in class folders: {stray} images have no class; {remedy}")
    return Found(found, ignored + stray, stamp)


def _in_class_folders(images: Sequence[tuple[PurePosixPath, int, int]], plain: str) -> tuple[list[Item], int]:
    """Images that lie in class folders, and how many others there are."""
    sorted_in = [image for image in images if len(image[0].parts) > 1]
    depth = _class_depth({name.parts[:-1] for name, _, _ in sorted_in})
    inside = [(name, at, size) for name, at, size in sorted_in if len(name.parts) > depth + 1]
    items = [Item(name.parts[depth], str(name), plain, at, size) for name, at, size in inside]
    return items, len(images) - len(items)


def _class_tar(path: Path, window: Window, name: str, plain: str) -> tuple[list[Item], int]:
    """The images of one class tar, whose name is the class, and how many other files it has."""
    label = PurePosixPath(name).stem
    where = str(path) if path.name == name else f"{path}: {name}"
    items, others = [], 0
    for member in members(window, where):
        inside = PurePosixPath(member.name)
        if member.isfile() and not member.issparse() and _is_image(inside):
            place = window.start + member.offset_data
            items.append(Item(label, f"{label}/{inside}", plain, place, member.size))
        elif not member.isdir():
            others += 1
            if inside.suffix == ".cls":
                raise DataError(f"{where}: is a WebDataset shard, no class tar: orchestrator data index {path.parent}")
    if not items:
        raise DataError(f"{where}: a class tar without JPEG or PNG images")
    return items, others


def _class_depth(folders: set[tuple[str, ...]]) -> int:
    """Which part of the paths is the class: the first one below the folder that holds all folders with images."""
    common = 0
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        common += 1
    return common - 1 if len(folders) == 1 else common
