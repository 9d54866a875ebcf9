"""Plain JPEG files to pixels by torchvision's decoder: the same pixels as Pillow in a third of the time.

Pillow stays the reference and decodes everything else: other colour spaces, EXIF, damaged files.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

# Baseline, extended and progressive frames: the ones that both decoders know.
_FRAMES = (0xC0, 0xC1, 0xC2)
_SCAN = 0xDA
# Tables, comments and application data that change neither size nor colours: DHT, DQT, DRI, COM, APP0, APP2 to APP13,
# APP15. Not APP1 (EXIF) and APP14 (Adobe's colours).
_HARMLESS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xEE), 0xEF})
# torchvision.io.ImageReadMode, by number of components.
_MODES = {1: 1, 3: 3}


def plain_size(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, components) of a JPEG without EXIF and Adobe colour marks; None for any other file.

    Believes nothing that is out of the ordinary, such as fill bytes: a scan out of step with the decoder's own
    would let a file hide its true size from the limit on pixels.
    """
    size = None
    at, end = 2, len(data) - 10
    while at < end and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if length < 2:
            return None
        if marker == _SCAN:
            return size
        if marker in _FRAMES and size is None:
            size = data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6], data[at + 9]
        elif marker not in _HARMLESS:
            return None
        at += 2 + length
    return None


def decode_plain(data: bytes, channels: int, max_pixels: int) -> Pixels | None:
    """(H, W, channels) uint8 of a plain JPEG with as many components; None when Pillow has to decode it."""
    decoder = _decoder()
    size = plain_size(data)
    if decoder is None or size is None or size[2] != channels or size[0] * size[1] > max_pixels:
        return None
    try:
        return decoder(data, channels)
    except RuntimeError:  # damaged: what it then is, Pillow decides
        return None


def decoder_name() -> str:
    """The package that decodes plain files here, with its version."""
    package = "pillow" if _decoder() is None else "torchvision"
    return f"{package} {version(package)}"


@cache
def _decoder() -> Callable[[bytes, int], Pixels] | None:
    """torchvision's operator, without the seconds that importing all of torchvision takes.

    None when it is not there, or when it does not give Pillow's pixels for a sample image on this machine.
    """
    spec = find_spec("torchvision")
    places = spec.submodule_search_locations if spec else None
    libraries = [file for place in places or () for file in sorted(Path(place).glob("image*.so"))]
    if not libraries:
        return None

    def decode(data: bytes, channels: int) -> Pixels:
        # A bytearray, since torch warns about memory that cannot be written.
        image_CHW = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), _MODES[channels])
        pixels: Pixels = image_CHW.numpy().transpose(1, 2, 0)
        return pixels

    sample = _sample()
    try:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
        found = decode(sample, 3)
    except (OSError, RuntimeError, AttributeError, TypeError):
        return None
    return decode if np.array_equal(found, np.asarray(Image.open(io.BytesIO(sample)))) else None


def _sample() -> bytes:
    """A colourful JPEG of 35 x 21 pixels with subsampled colours: odd sizes and edges show different decoders."""
    y, x = np.mgrid[0:21, 0:35]
    pixels = np.stack([x * 7, y * 12, (x * y * 5) % 256], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()
