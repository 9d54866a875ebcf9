"""Plain JPEG files to pixels by the quickest decoder that is here: the same pixels as Pillow in a third of the time.

simplejpeg (libjpeg-turbo 3) writes straight into the row of a batch; without it torchvision's decoder. Pillow stays
the reference and decodes everything else: other colour spaces, EXIF, damaged files.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
# Decodes a file to so many channels, into the array where one is given; raises ValueError or RuntimeError.
Decode = Callable[[bytes, int, Pixels | None], Pixels]

# Baseline, extended and progressive frames: the ones that both decoders know.
_FRAMES = (0xC0, 0xC1, 0xC2)
_SCAN = 0xDA
# Tables, comments and application data that change neither size nor colours: DHT, DQT, DRI, COM, APP0, APP2 to APP13,
# APP15. Not APP1 (EXIF) and APP14 (Adobe's colours).
_HARMLESS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xEE), 0xEF})
# A longer head of a file (a colour profile) is not worth remembering.
_SHORT_HEAD = 4096
# torchvision.io.ImageReadMode and simplejpeg's colour space, by number of channels.
_MODES = {1: 1, 3: 3}
_SPACES = {1: "GRAY", 3: "RGB"}
Size = tuple[int, int, int]


class _Head(NamedTuple):
    """The bytes of a file up to its scan, and the size that they state."""

    content: bytes
    size: Size | None


# The one seen last: small images mostly have the head of the one before.
_last = _Head(b"\0", None)


def plain_size(data: bytes) -> Size | None:
    """(width, height, components) of a JPEG without EXIF and Adobe colour marks; None for any other file.

    Believes nothing that is out of the ordinary, such as fill bytes: a scan out of step with the decoder's own
    would let a file hide its true size from the limit on pixels.
    """
    global _last
    last = _last
    # The walk ends with the head when ten bytes and more come after its marker.
    if data.startswith(last.content) and len(data) > len(last.content) + 6:
        return last.size
    size, at = _walked(data)
    if 0 < at < _SHORT_HEAD:
        _last = _Head(data[: at + 4], size)
    return size


def _walked(data: bytes) -> tuple[Size | None, int]:
    """What `plain_size` says, and where the scan begins; 0 for what is not plain."""
    size = None
    at, end = 2, len(data) - 10
    while at < end and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if length < 2:
            break
        if marker == _SCAN:
            return size, at
        if marker in _FRAMES and size is None:
            size = data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6], data[at + 9]
        elif marker not in _HARMLESS:
            break
        at += 2 + length
    return None, 0


def decode_plain(data: bytes, channels: int, max_pixels: int, row: Pixels | None = None) -> Pixels | None:
    """(H, W, channels) uint8 of a plain JPEG, gray over all channels; None when Pillow has to decode it.

    It is `row` itself where that has the shape of the image.
    """
    decoder = _decoder()[1]
    size = plain_size(data)
    if decoder is None or size is None or size[2] not in (1, channels) or size[0] * size[1] > max_pixels:
        return None
    if row is not None and row.shape != (size[1], size[0], channels):
        row = None
    try:
        return decoder(data, channels, row)
    except (RuntimeError, ValueError):  # damaged: what it then is, Pillow decides
        return None


def decoder_name() -> str:
    """The package that decodes plain files here, with its version."""
    package = _decoder()[0]
    return f"{package} {version(package)}"


@cache
def _decoder() -> tuple[str, Decode | None]:
    """The first of the quick decoders that is here and gives Pillow's pixels for sample images on this machine."""
    for package, made in (("simplejpeg", _by_simplejpeg), ("torchvision", _by_torchvision)):
        try:
            decoder = made()
            if all(_is_right(decoder, *kind) for kind in ((3, 3), (1, 1), (1, 3))):
                return package, decoder
        except (ImportError, OSError, RuntimeError, ValueError, AttributeError, TypeError):
            continue
    return "pillow", None


def _by_simplejpeg() -> Decode:
    from simplejpeg import decode_jpeg

    def decode(data: bytes, channels: int, row: Pixels | None) -> Pixels:
        pixels: Pixels = decode_jpeg(data, _SPACES[channels], False, False, 0, 0, 1.0, row)
        if row is None:
            return pixels
        if pixels.shape != row.shape:
            raise ValueError("the file is of another size than its row")
        return row

    return decode


def _by_torchvision() -> Decode:
    """torchvision's operator, without the seconds that importing all of torchvision takes."""
    spec = find_spec("torchvision")
    places = spec.submodule_search_locations if spec else None
    libraries = [file for place in places or () for file in sorted(Path(place).glob("image*.so"))]
    if not libraries:
        raise ImportError("torchvision's image library is not here")
    torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]

    def decode(data: bytes, channels: int, row: Pixels | None) -> Pixels:
        # A bytearray, since torch warns about memory that cannot be written.
        image_CHW = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), _MODES[channels])
        pixels: Pixels = image_CHW.numpy().transpose(1, 2, 0)
        if row is None:
            return pixels
        row[...] = pixels
        return row

    return decode


def _is_right(decoder: Decode, components: int, channels: int) -> bool:
    """Whether a sample image comes out with Pillow's pixels, anew and into a row."""
    data = _sample(components)
    image = Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB")
    expected = np.asarray(image).reshape(21, 35, channels)
    row = np.zeros_like(expected)
    decoder(data, channels, row)
    return np.array_equal(decoder(data, channels, None), expected) and np.array_equal(row, expected)


def _sample(components: int) -> bytes:
    """A JPEG of 35 x 21 pixels with subsampled colours: odd sizes and edges show different decoders."""
    y, x = np.mgrid[0:21, 0:35]
    pixels = np.stack([x * 7, y * 12, (x * y * 5) % 256], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels if components == 3 else pixels[:, :, 2]).save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()
