"""Smaller files for packing, only when asked: images brought to a longest side, JPEG encoded anew."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image, ImageOps

from orchestrator.data.images.decode import MAX_PIXELS, BadImage

_QUALITY = 90


@dataclass(frozen=True)
class Encoding:
    """`max_side` in pixels: larger images are made smaller. `quality` (1 to 100) of JPEG: all of them are encoded anew.

    Without either, bytes stay as they are.
    """

    max_side: int | None = None
    quality: int | None = None

    @property
    def is_asked(self) -> bool:
        return self.max_side is not None or self.quality is not None

    @property
    def name(self) -> str:
        """What decides the bytes, the version of the encoder too."""
        return f"max_side {self.max_side}, quality {self.quality}, Pillow {PIL.__version__}" if self.is_asked else ""


def encoded(data: bytes, kind: str, encoding: Encoding) -> bytes:
    """A `jpg` or `png` as the encoding wants it, of the same kind; its own bytes where nothing has to change.

    What is encoded anew is upright (EXIF), 8 bit, gray or RGB (PNG may keep alpha). Raises BadImage.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=["JPEG" if kind == "jpg" else "PNG"])
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded")
        side = max(image.size)
        limit = encoding.max_side or side
        if side <= limit and (encoding.quality is None or kind == "png"):
            return data
        image = _plain(ImageOps.exif_transpose(image), kind)
        width, height = (max(1, round(length * min(1.0, limit / side))) for length in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        if kind == "jpg":
            image.save(buffer, format="JPEG", quality=encoding.quality or _QUALITY)
        else:
            image.save(buffer, format="PNG")
    except BadImage:
        raise
    except Exception as error:
        # Pillow raises whatever its codecs do for damaged input; for us they all mean the same.
        raise BadImage(f"{type(error).__name__}: {error}") from error
    return buffer.getvalue()


def _plain(image: Image.Image, kind: str) -> Image.Image:
    """8 bits a channel, without palette, in a mode that the kind of file can hold."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    kept = ("L", "RGB") if kind == "jpg" else ("L", "LA", "RGB", "RGBA")
    if image.mode in kept:
        return image
    return image.convert("L" if image.mode == "1" else "RGB" if kind == "jpg" else "RGBA")
