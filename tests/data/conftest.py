"""Small images and a small packed set for the tests of the data room."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.index import Index
from orchestrator.data.loading.stream import Batch
from orchestrator.data.packing.pack import pack

Files = list[tuple[str, bytes]]


def noise(seed: int, width: int = 9, height: int = 7, channels: int = 3) -> np.ndarray:
    """Random pixels (height, width, channels), without the last axis for one channel."""
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    """The bytes of an image file."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, format=kind, **options)
    return buffer.getvalue()


# What a PNG ends with: a damaged one that has it is packed, and found when it is decoded.
PNG_END = bytes(4) + b"IEND\xaeB`\x82"


def without_tables(jpeg: bytes) -> bytes:
    """A JPEG with all its parts but one: nothing but decoding tells."""
    return jpeg.replace(b"\xff\xdb", b"\xff\xec")


def tar_bytes(files: Sequence[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    """A tar of (name, content) as a file."""
    path.write_bytes(tar_bytes(files))
    return path


@pytest.fixture
def images() -> list[tuple[str, bytes]]:
    """Two classes of six images, as (CLASS/NAME, content)."""
    return [(f"{label}/{i}.png", encoded(noise(10 * i + ord(label)))) for label in "ab" for i in range(6)]


def forty_packed(folder: Path, shard_bytes: int) -> Index:
    """Forty small images of two classes."""
    images = [(f"{label}/{i:02d}.png", encoded(noise(i, 30, 30))) for label in "ab" for i in range(20)]
    return pack(write_tar(folder / "forty.tar", images), folder / "forty", shard_bytes=shard_bytes)


def digest(batches: Iterable[Batch]) -> str:
    """The hash of all pixels and of which samples they are of."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(batch.images.numpy().tobytes() + batch.indices.tobytes())
    return found.hexdigest()


@pytest.fixture
def small(images: list[tuple[str, bytes]], tmp_path: Path) -> Index:
    """The two classes packed into several shards."""
    return pack(write_tar(tmp_path / "small.tar", images), tmp_path / "small", shard_bytes=6000)
