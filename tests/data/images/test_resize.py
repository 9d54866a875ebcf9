"""The quick resize of random crops: Pillow's pictures to a fifth of a gray level, whatever decoded them."""

from __future__ import annotations

import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.data.images.augment import Augmenter
from orchestrator.data.images.decode import decode
from orchestrator.data.images.jpeg import decode_plain
from orchestrator.data.images.resize import resize_into, training_size
from orchestrator.data.index import Index
from orchestrator.data.loading.image_source import ImageSource
from tests.conftest import TEST_DATA
from tests.data.conftest import encoded, noise

BOXES = [(0, 0, 90, 60), (13, 7, 80, 41), (40, 20, 44, 23), (5, 0, 6, 60), (89, 59, 90, 60)]


def photograph(width: int = 90, height: int = 60) -> np.ndarray:
    """Smooth colours with edges."""
    y, x = np.mgrid[0:height, 0:width]
    colours = [128 + 100 * np.sin(x / 9 + c) * np.cos(y / 7 - c) for c in range(3)]
    pixels = np.stack(colours, axis=-1)
    pixels[(x + 2 * y) % 37 < 9] = 230
    return pixels.astype(np.uint8)


def quick(pixels: np.ndarray, box: tuple[int, int, int, int], size: int, interpolation: str) -> np.ndarray:
    row = np.empty((size, size, pixels.shape[2]), dtype=np.uint8)
    resize = resize_into(row, interpolation)
    assert resize is not None
    assert resize(pixels, box) is row
    return row


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1, 16, 61, 128])
@pytest.mark.parametrize("box", BOXES)
def test_crops_have_the_pixels_of_pillow(box: Any, size: int, interpolation: str) -> None:
    for pixels in (photograph(), noise(1, 90, 60), photograph()[:, :, :1].copy()):
        found = quick(pixels, box, size, interpolation)
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).crop(box)
        expected = np.asarray(image.resize((size, size), Image.Resampling[interpolation.upper()]))
        difference = np.abs(found.astype(int) - expected.reshape(found.shape))
        assert difference.mean() <= 0.2
        assert difference.max() <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_those_of_interpolate(interpolation: str) -> None:
    pixels = noise(2, 90, 60)
    for left, top, right, bottom in BOXES:
        crop = torch.from_numpy(pixels[top:bottom, left:right].copy()).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(crop, size=(31, 31), mode=interpolation, antialias=True)
        found = quick(pixels, (left, top, right, bottom), 31, interpolation)
        assert np.abs(found.astype(int) - expected[0].permute(1, 2, 0).numpy()).max() <= 1


def test_other_filters_are_left_to_pillow() -> None:
    assert resize_into(np.empty((4, 4, 3), dtype=np.uint8), "nearest") is None


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "data",
    [encoded(photograph(), "JPEG"), encoded(photograph()), encoded(photograph(), "JPEG", "CMYK"),
     encoded(noise(3, 90, 60, 1)), encoded(photograph(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")],
    ids=["jpeg", "png", "cmyk", "gray", "exif"],
)  # fmt: skip
def test_a_crop_does_not_depend_on_the_decoder(data: bytes, channels: int) -> None:
    found = []
    for plain_jpeg in (decode_plain, None):
        row = np.empty((24, 24, channels), dtype=np.uint8)
        resize = resize_into(row, "bilinear")
        options: dict[str, Any] = {"plain_jpeg": plain_jpeg, "resize": resize, "crop": lambda w, h: (3, 2, w - 9, h)}
        assert decode(data, image_size=24, channels=channels, **options) is row
        found.append(row)
    assert np.array_equal(*found)


def test_evaluation_keeps_the_resizing_of_pillow() -> None:
    data = encoded(photograph())
    resize = resize_into(np.empty((24, 24, 3), dtype=np.uint8), "bilinear")
    assert np.array_equal(
        decode(data, image_size=24, channels=3, resize=resize), decode(data, image_size=24, channels=3)
    )


def test_a_batch_of_random_crops_is_the_same_from_every_thread(small: Index) -> None:
    source = ImageSource(small, image_size=5, channels=3, augment={"resized_crop": [0.2, 1.0], "flip": True}, seed=4)
    indices = np.arange(small.num_samples)
    expected = source.batch(indices, epoch=2)
    with ThreadPoolExecutor(4) as pool:
        for batch in pool.map(lambda _: source.batch(indices, epoch=2), range(40)):
            assert torch.equal(batch.images, expected.images)
    single = [source.batch(indices[i : i + 1], epoch=2).images[0] for i in indices]
    assert torch.equal(torch.stack(single), expected.images)


def test_photographs_differ_from_pillow_by_less_than_a_fifth_of_a_level() -> None:
    if not (TEST_DATA / "imagenet-samples200.tar").exists():
        pytest.skip("imagenet-samples200.tar is not there")
    crops = Augmenter({"resized_crop": (0.08, 1.0)}, seed=0, epoch=0).crops(np.arange(1000))
    assert crops is not None
    differences = []
    with tarfile.open(TEST_DATA / "imagenet-samples200.tar") as tar:
        for number, member in enumerate(tar):
            content = tar.extractfile(member) if member.isfile() and number % 8 == 0 else None
            if content is None:
                continue
            data, row = content.read(), np.empty((224, 224, 3), dtype=np.uint8)
            options: dict[str, Any] = {"image_size": 224, "channels": 3, "crop": crops[number]}
            decode(data, plain_jpeg=decode_plain, resize=resize_into(row, "bilinear"), **options)
            differences.append(np.abs(row.astype(int) - decode(data, **options)).mean())
    assert len(differences) > 10
    assert np.mean(differences) <= 0.2


def test_training_images_grow_to_their_size_over_a_share_of_the_epochs() -> None:
    sizes = [training_size(epoch, full=64, epochs=10, from_size=30, until=0.5) for epoch in range(20)]
    assert sizes[:10] == [30, 36, 40, 48, 56, 64, 64, 64, 64, 64]
    assert sizes[10:] == sizes[:10], "of layers trained one after the other, each begins anew"


def test_a_source_makes_images_of_the_size_of_their_epoch_and_of_full_size_for_evaluation(small: Index) -> None:
    source = ImageSource(
        small, image_size=16, channels=3, keep_bytes=10**6, training_size=lambda epoch: (8, 12, 16)[epoch]
    )
    indices = np.arange(4)
    assert [source.batch(indices, epoch).images.shape[2:] for epoch in range(3)] == [(8, 8), (12, 12), (16, 16)]
    assert source.batch(indices).images.shape == (4, 3, 16, 16)
    small_image = ImageSource(small, image_size=8, channels=3).batch(indices).images
    assert torch.equal(source.batch(indices, 0).images, small_image)
