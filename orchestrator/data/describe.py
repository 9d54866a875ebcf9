"""What a packed set is like: classes, sizes, modes, bytes, balance, and a few of its images."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hff.randomness import derive_seed
from orchestrator.data.images.decode import BadImage, decode, suffix_of
from orchestrator.data.index import SUFFIXES, Index
from orchestrator.data.reader import ShardReader

LOOKED_AT = 2000
_THUMB = 96


@dataclass(frozen=True)
class Description:
    """Counts over the whole index; sizes in pixels and modes of `looked_at` images chosen evenly, or of all."""

    samples: int
    bytes: tuple[int, float, int]
    suffixes: Mapping[str, int]
    per_class: Mapping[str, int]
    looked_at: int
    widths: Sequence[int]
    heights: Sequence[int]
    modes: Mapping[str, int]
    bad: int

    @property
    def imbalance(self) -> float:
        """Images of the largest class for one of the smallest that has any."""
        counts = [count for count in self.per_class.values() if count]
        return max(counts) / min(counts)


def chosen(index: Index, count: int) -> NDArray[np.int64]:
    """At most `count` samples, drawn with a fixed seed, in the order of the index."""
    random = np.random.Generator(np.random.PCG64(derive_seed(0, "describe")))
    everything = index.num_samples
    return np.sort(random.choice(everything, size=min(count, everything), replace=False)).astype(np.int64)


def describe(index: Index, looked_at: int = LOOKED_AT) -> Description:
    """Count what the index knows, and look at the headers of some images. Raises DataError."""
    lengths = index.members["length"]
    per_class = np.bincount(index.labels, minlength=len(index.classes)).tolist()
    suffixes = np.bincount(index.members["suffix"], minlength=len(SUFFIXES)).tolist()
    reader, sizes, modes, bad = ShardReader(index), [], Counter[str](), 0
    for i in chosen(index, looked_at).tolist():
        seen = _header(reader.read(i)[2])
        if seen is None:
            bad += 1
            continue
        sizes.append(seen[:2])
        modes[seen[2]] += 1
    return Description(
        samples=index.num_samples,
        bytes=(int(lengths.min()), float(lengths.mean()), int(lengths.max())),
        suffixes={suffix: count for suffix, count in zip(SUFFIXES, suffixes, strict=True) if count},
        per_class=dict(zip(index.classes, per_class, strict=True)),
        looked_at=min(looked_at, index.num_samples),
        widths=[width for width, _ in sizes],
        heights=[height for _, height in sizes],
        modes=dict(sorted(modes.items(), key=lambda item: (-item[1], item[0]))),
        bad=bad,
    )


def _header(data: bytes) -> tuple[int, int, str] | None:
    """Width, height and Pillow's mode, without decoding; None when it is no image that we decode."""
    kind = suffix_of(data)
    if kind is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG" if kind == "jpg" else "PNG"]) as image:
            return image.width, image.height, image.mode
    except Exception:  # Pillow raises whatever its codecs do for damaged input
        return None


def thumbnails(index: Index, count: int) -> list[tuple[str, bytes]]:
    """(class, JPEG of at most 96 pixels) of a few images, of as many classes as there can be."""
    reader, shown = ShardReader(index), []
    for i in _spread(index, count):
        label = index.classes[index.labels[i]]
        image = thumbnail(reader, i)
        if image is not None:
            shown.append((index.class_names.get(label, label), image))
    return shown


def thumbnail(reader: ShardReader, sample: int) -> bytes | None:
    """One sample as a JPEG of 96 pixels; None where it cannot be decoded."""
    try:
        pixels = decode(reader.read(sample)[2], image_size=_THUMB, channels=3, crop_share=1.0)
    except BadImage:
        return None
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def _spread(index: Index, count: int) -> list[int]:
    """The first drawn images of each class in turn, sorted by class."""
    drawn = chosen(index, 50 * count)
    random = np.random.Generator(np.random.PCG64(derive_seed(0, "thumbnails")))
    drawn = drawn[random.permutation(len(drawn))]
    turn: Counter[int] = Counter()
    ranked: list[tuple[int, int, int, int]] = []
    for i in drawn.tolist():
        label = int(index.members["label"][i])
        ranked.append((turn[label], len(ranked), label, i))
        turn[label] += 1
    return [i for _, i in sorted((label, i) for _, _, label, i in sorted(ranked)[:count])]
