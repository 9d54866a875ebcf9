"""From an image folder, a tar of one, or the embedded digits to WebDataset shards and their index."""

from __future__ import annotations

import gzip
import importlib.util
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from hff.randomness import derive_seed
from orchestrator.data.decode import encode_png, suffix_of
from orchestrator.data.index import SUFFIXES, Index, Shard, member_dtype, open_index, write_index
from orchestrator.data.shard_writer import ShardWriter
from orchestrator.errors import DataError

DIGITS = "digits"
SHARD_BYTES = 256 * 2**20
_KEY_DIGITS = 9
_IMAGE_NAMES = (".jpg", ".jpeg", ".png")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """The images of a source, sorted by class and name, and how many of its files are something else."""

    items: list[Item]
    ignored: int = 0


@dataclass(frozen=True)
class Item:
    """One image of the source: its class, its path in the source, and how to read it."""

    label: str
    name: str
    read: Callable[[], bytes]


def pack(source: str | Path, out: Path, *, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None) -> Index:
    """Write shards and index of `source` into the folder `out`, which must be empty or absent.

    The result is a function of the images alone, byte for byte: classes are the sorted folder names, samples are
    shuffled with a fixed seed, times and owners are zero. The folder appears when it is complete. Raises
    DataError for a source without images or an `out` that holds something else.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already and not empty; remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.packing-") as folder:
        work = Path(folder) / "shards"
        work.mkdir()
        with _opened(source, Path(folder)) as found:
            if not found.items:
                raise DataError(f"{source}: no JPEG or PNG images in class folders (expected CLASS/IMAGE)")
            _write(found, work, shard_bytes, Path(source).name, progress)
        return _published(work, out)


def _published(work: Path, out: Path) -> Index:
    """Put the finished folder in its place. Another process may have packed the same data meanwhile."""
    try:
        if out.exists():
            out.rmdir()
        os.rename(work, out)
    except OSError as error:
        if not (out / "index.json").is_file() or open_index(out).sha256 != open_index(work).sha256:
            raise DataError(f"{out}: the shards cannot be put there: {error.strerror}") from None
    return open_index(out)


@contextmanager
def _opened(source: str | Path, scratch: Path) -> Iterator[Found]:
    """The images of a source, which stays open meanwhile."""
    if source == DIGITS:
        yield Found(_digits())
        return
    path = Path(source)
    if path.is_dir():
        yield _folder_items(path)
    elif path.is_file():
        with _tar_file(path, scratch / "source.tar") as file:
            yield _tar_items(path, file)
    else:
        raise DataError(f"{path}: no such file or folder; SOURCE is an image folder, a tar(.gz) of one, or digits")


def _digits() -> list[Item]:
    """scikit-learn's 1797 handwritten digits, 8 x 8, as gray PNG (Alpaydin and Kaynak, UCI 1998)."""
    table = np.loadtxt(_digits_file(), delimiter=",", dtype=np.float64)
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

    def reader(i: int) -> Callable[[], bytes]:
        return lambda: encode_png(pixels[i])

    labels = [f"{label:.0f}" for label in table[:, -1]]
    return sorted(
        (Item(label, f"{label}/{i:04d}.png", reader(i)) for i, label in enumerate(labels)),
        key=lambda item: (item.label, item.name),
    )


def _digits_file() -> Path:
    """Where scikit-learn keeps them; importing it for this one table would take 4 s."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.submodule_search_locations, "a dependency of this package"
    return Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")


def _is_image(name: PurePosixPath | Path) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
    return name.suffix.lower() in _IMAGE_NAMES and not hidden


def _folder_items(root: Path) -> Found:
    items, ignored = [], 0

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    # Class folders may be links. Not Path.rglob: it leaves out folders that it may not read, without a word.
    _, labels, beside = next(os.walk(root, onerror=fail))
    ignored += len(beside)
    for label in labels:
        for folder, _, files in os.walk(root / label, onerror=fail):
            for path in (Path(folder, file) for file in files):
                name = path.relative_to(root)
                if not _is_image(name):
                    ignored += 1
                elif not path.is_file():
                    raise DataError(f"{path}: is a link to nothing or no ordinary file; repair or remove it")
                else:
                    items.append(Item(label, name.as_posix(), _file_reader(path)))
    return Found(sorted(items, key=lambda item: (item.label, item.name)), ignored)


def _file_reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None

    return read


@contextmanager
def _tar_file(path: Path, plain: Path) -> Iterator[BinaryIO]:
    """A tar that can be read at any place; a compressed one is unpacked beside the shards first."""
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if compressed:
            with gzip.open(path) as source, open(plain, "wb") as target:
                shutil.copyfileobj(source, target, 2**20)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}") from None
    with open(plain if compressed else path, "rb") as file:
        yield file
    plain.unlink(missing_ok=True)


def _tar_items(path: Path, file: BinaryIO) -> Found:
    found: list[tuple[PurePosixPath, int, int]] = []
    ignored = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isfile() and not member.issparse() and _is_image(name) and len(name.parts) > 1:
                    found.append((name, member.offset_data, member.size))
                elif not member.isdir():
                    ignored += 1
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: is not a tar that can be read: {error}") from None
    descriptor = file.fileno()
    # A reader takes a damaged header for the end; only a block of zeros is one.
    if os.pread(descriptor, tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"{path}: is damaged or cut at byte {end} of the tar, after {len(found)} images: the end mark of a tar is "
            "missing there; get the file again"
        )

    def reader(offset: int, size: int) -> Callable[[], bytes]:
        return lambda: os.pread(descriptor, size, offset)

    depth = _class_depth({name.parts[:-1] for name, _, _ in found})
    in_classes = [(name, offset, size) for name, offset, size in found if len(name.parts) > depth + 1]
    items = [Item(name.parts[depth], str(name), reader(offset, size)) for name, offset, size in in_classes]
    return Found(sorted(items, key=lambda item: (item.label, item.name)), ignored + len(found) - len(in_classes))


def _class_depth(folders: set[tuple[str, ...]]) -> int:
    """Which part of the paths is the class: the first one below the folder that holds all folders with images."""
    common = 0
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        common += 1
    return common - 1 if len(folders) == 1 else common


def _write(found: Found, work: Path, shard_bytes: int, source: str, progress: Progress | None) -> None:
    items = found.items
    classes = sorted({item.label for item in items})
    numbers = {label: i for i, label in enumerate(classes)}
    random = np.random.Generator(np.random.PCG64(derive_seed(0, "pack")))
    rows = np.zeros(len(items), dtype=member_dtype(_KEY_DIGITS))
    shards: list[Shard] = []
    writer: ShardWriter | None = None
    try:
        for i, chosen in enumerate(random.permutation(len(items)).tolist()):
            item = items[chosen]
            data = item.read()
            suffix = suffix_of(data)
            if suffix is None:
                raise DataError(f"{source}: {item.name}: neither JPEG nor PNG by its first bytes; remove it")
            if writer is None:
                writer = ShardWriter(work / f"shard-{len(shards):06d}.tar")
            key, label = f"{i:0{_KEY_DIGITS}d}", numbers[item.label]
            offset = writer.add(f"{key}.{suffix}", data)
            writer.add(f"{key}.cls", str(label).encode())
            place = (key.encode(), len(shards), offset, len(data))
            rows[i] = (*place, zlib.crc32(data), label, SUFFIXES.index(suffix))
            writer.samples += 1
            if writer.position >= shard_bytes:
                shards.append(writer.finish())
                writer = None
            if progress is not None:
                progress(i + 1, len(items))
        if writer is not None:
            shards.append(writer.finish())
    finally:
        if writer is not None:
            writer.close()
    write_index(work, classes, shards, rows, source, found.ignored)
