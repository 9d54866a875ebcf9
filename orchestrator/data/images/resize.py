"""Random crops to size: antialiased by torch, on the crop alone, straight into the row of a batch.

As near to Pillow as rounding, in less than half of its time. Images for evaluation keep
Pillow's resizing, which published results were made with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from orchestrator.data.images.decode import Box, Pixels

# The operators behind torch.nn.functional.interpolate, which itself cannot write where it is told to.
_OPERATORS = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


def training_size(epoch: int, *, full: int, epochs: int, from_size: int, until: float) -> int:
    """Side of the training images of an epoch: from `from_size` to `full` pixels over the share `until` of the epochs.

    A multiple of 4 on the way. With layers trained one after the other, each has `epochs` and grows anew.
    """
    done = (epoch % epochs) / (until * epochs)
    return full if done >= 1 else max(from_size, int(from_size + (full - from_size) * done) // 4 * 4)


def resize_into(row: Pixels, interpolation: str) -> Callable[[Pixels, Box], Pixels] | None:
    """What resizes a box of (H, W, C) pixels into `row` (size, size, C) and returns it; None: leave it to Pillow."""
    return partial(_resized, row, interpolation) if interpolation in _OPERATORS else None


def _resized(row: Pixels, interpolation: str, pixels: Pixels, box: Box) -> Pixels:
    left, top, right, bottom = box
    crop = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    target = torch.from_numpy(row).permute(2, 0, 1)[None]
    _OPERATORS[interpolation](crop, list(row.shape[:2]), False, None, None, out=target)
    return row
