"""How an image comes to size: the share that is kept and the interpolation, against Pillow and timm."""

from __future__ import annotations

import io

import numpy as np
import pytest
import timm
from PIL import Image

from orchestrator.data.images.decode import decode


def photograph(width: int = 200, height: int = 150) -> Image.Image:
    """Smooth colours, so that resizing in one or in two steps is nearly the same."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / 17 + c) * np.cos(y / 23 + c) for c in range(3)]
    return Image.fromarray(np.stack(waves, axis=2).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("share", "side"), [(1.0, 150), (0.9, 135), (0.875, 131), (0.5, 75)])
@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_the_central_share_is_resized_as_asked(share: float, side: int, name: str) -> None:
    image = photograph()
    left, top = (200 - side) // 2, (150 - side) // 2
    expected = image.resize((32, 32), Image.Resampling[name.upper()], box=(left, top, left + side, top + side))
    found = decode(png(image), image_size=32, channels=3, crop_share=share, interpolation=name)
    assert np.array_equal(found, np.asarray(expected))


def test_a_share_that_is_not_given_is_all_of_a_small_image_and_seven_eighths_of_a_photograph() -> None:
    data = png(photograph())
    for size, share in ((32, 1.0), (64, 0.875)):
        given = decode(data, image_size=size, channels=3, crop_share=share)
        assert np.array_equal(decode(data, image_size=size, channels=3), given)


def test_an_image_of_the_right_size_stays_as_it_is() -> None:
    image = photograph(64, 64)
    found = decode(png(image), image_size=64, channels=3, crop_share=0.5, interpolation="bicubic")
    assert np.array_equal(found, np.asarray(image))


@pytest.mark.parametrize(("share", "name"), [(0.95, "bicubic"), (0.875, "bilinear")])
def test_evaluation_sees_what_timm_would_show(share: float, name: str) -> None:
    transform = timm.data.create_transform((3, 96, 96), interpolation=name, crop_pct=share, mean=(0,) * 3, std=(1,) * 3)
    theirs = transform(photograph()).numpy().transpose(1, 2, 0) * 255

    def difference(kept: float) -> float:
        ours = decode(png(photograph()), image_size=96, channels=3, crop_share=kept, interpolation=name)
        return float(np.abs(ours - theirs).mean())

    # timm resizes first and then crops whole pixels; ours is one resampling of the same region.
    assert difference(share) < 3
    assert difference(share - 0.1) > 3 * difference(share)
    assert difference(min(1.0, share + 0.1)) > 2 * difference(share)
