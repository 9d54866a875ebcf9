"""Bytes to pixels: JPEG and PNG only, with a limit on pixels before anything is unpacked."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
Crop = Callable[[int, int], Box]
Resize = Callable[[Pixels, Box], Pixels]

MAX_PIXELS = 64_000_000
# Evaluation of photographs: the usual share of the shorter side that the central crop keeps.
CENTRAL_SHARE = 0.875
_PHOTOGRAPH_SIZE = 64

# Once and for Pillow alone: warnings.catch_warnings is not safe in threads, it left all warnings of a worker off.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """An image that cannot be decoded; the text says why, `reason` in words that many such images share."""

    def __init__(self, text: str, reason: str | None = None) -> None:
        super().__init__(text)
        self.reason = reason or text


class Fault(str):
    """Which image was left out and why; `reason` is what it has in common with others."""

    reason = "cannot be decoded"


class PlainDecoder(Protocol):
    """A quicker decoder with Pillow's pixels; None from it means that Pillow has to do it."""

    def __call__(self, data: bytes, channels: int, max_pixels: int, row: Pixels | None = None) -> Pixels | None: ...


def suffix_of(data: bytes) -> str | None:
    """jpg or png by the first bytes, whatever the file was called; None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    return "png" if data.startswith(b"\x89PNG\r\n\x1a\n") else None


def decode(
    data: bytes,
    *,
    image_size: int,
    channels: int,
    crop: Crop | None = None,
    plain_jpeg: PlainDecoder | None = None,
    crop_share: float | None = None,
    interpolation: str = "bilinear",
    resize: Resize | None = None,
    row: Pixels | None = None,
) -> Pixels:
    """Decode to (image_size, image_size, channels) uint8.

    `crop(width, height)` gives the box (left, top, right, bottom) to keep; without it the centre is kept: the
    share `crop_share` of the shorter side (all of a small image, 7/8 of a photograph unless it is given).
    Defined results: gray is repeated over three channels, CMYK and palette are converted, alpha is ignored,
    16 bit keep their upper 8, EXIF rotation is applied. `plain_jpeg` changes the speed, not the result; `resize`
    brings what `crop` chose to size instead of Pillow. The result is `row` itself where a plain file could be
    unpacked into it. Raises BadImage.
    """
    kind = suffix_of(data)
    if kind is None:
        raise BadImage("neither JPEG nor PNG by its first bytes" if data else "empty file")
    pixels = None
    if kind == "jpg" and plain_jpeg is not None:
        pixels = plain_jpeg(data, channels, MAX_PIXELS, row if crop is None else None)
        if pixels is not None and pixels is row:
            return pixels
    frame = _Frame(image_size, crop, crop_share, interpolation, resize if crop else None)
    if pixels is not None:
        return _framed(pixels, frame)
    try:
        image = Image.open(io.BytesIO(data), formats=["JPEG" if kind == "jpg" else "PNG"])
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(
                f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded", "too many pixels"
            )
        return _pixels(image, "L" if channels == 1 else "RGB", frame)
    except BadImage:
        raise
    except Exception as error:
        # Pillow raises whatever its codecs do for damaged input; for us they all mean the same.
        raise BadImage(f"{type(error).__name__}: {error}", f"damaged {kind}") from error


def encode_png(pixels: Pixels) -> bytes:
    """A PNG file of (H, W, 1 or 3) or (H, W) uint8; `decode` gives the same pixels back."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


class _Frame(NamedTuple):
    """What of an image is kept, and how it comes to size."""

    size: int
    crop: Crop | None
    share: float | None
    interpolation: str
    resize: Resize | None

    def box(self, width: int, height: int) -> Box:
        if self.crop is not None:
            return self.crop(width, height)
        if (width, height) == (self.size, self.size):
            return 0, 0, width, height
        share = self.share or (CENTRAL_SHARE if self.size >= _PHOTOGRAPH_SIZE else 1.0)
        side = max(1, round(min(width, height) * share))
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side


def _framed(pixels: Pixels, frame: _Frame) -> Pixels:
    """Crop and resize decoded pixels of the right mode, as `_pixels` does."""
    height, width, channels = pixels.shape
    if frame.crop is None and (width, height) == (frame.size, frame.size):
        return pixels
    if frame.resize is not None:
        return frame.resize(pixels, frame.box(width, height))
    image = Image.fromarray(np.ascontiguousarray(pixels if channels == 3 else pixels[:, :, 0]))
    return _pixels(image, image.mode, frame)


def _pixels(image: Image.Image, mode: str, frame: _Frame) -> Pixels:
    size = frame.size
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    box = frame.box(image.width, image.height)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode != mode:
        if image.mode == "P":
            image = image.convert("RGBA")
        image = image.convert(mode)
    if frame.resize is not None:
        whole = np.array(image)  # a copy: torch takes no memory that cannot be written
        return frame.resize(whole[:, :, None] if whole.ndim == 2 else whole, box)
    if box != (0, 0, image.width, image.height) or image.size != (size, size):
        image = image.resize((size, size), Image.Resampling[frame.interpolation.upper()], box=box)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
