"""The quick decoder has Pillow's pixels or none at all."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.images import jpeg
from orchestrator.data.images.decode import MAX_PIXELS, BadImage, decode
from orchestrator.data.images.jpeg import decode_plain, decoder_name, plain_size
from tests.conftest import TEST_DATA
from tests.data.conftest import encoded, noise


def by_pillow(data: bytes, mode: str | None = None) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    pixels = np.asarray(image.convert(mode) if mode else image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


@pytest.fixture(params=["simplejpeg", "torchvision", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each of the decoders, as if those before it were not installed."""
    if request.param != "simplejpeg":
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    if request.param == "pillow":
        monkeypatch.setattr(jpeg, "find_spec", lambda name: None)
    jpeg._decoder.cache_clear()
    yield request.param
    jpeg._decoder.cache_clear()


def test_the_best_decoder_that_is_here_is_used_and_named(decoder: str) -> None:
    assert decoder_name().split()[0] == decoder
    data = encoded(smooth(33, 17), "JPEG")
    found = decode_plain(data, 3, MAX_PIXELS)
    assert (found is None) == (decoder == "pillow")
    assert decode(data, image_size=16, channels=3, plain_jpeg=decode_plain).tobytes() == outcome(data)


def test_a_decoder_with_other_pixels_than_pillow_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = jpeg._by_simplejpeg()
    monkeypatch.setattr(jpeg, "_by_simplejpeg", lambda: lambda data, channels, row: right(data, channels, None) ^ 1)
    jpeg._decoder.cache_clear()
    try:
        assert decoder_name().startswith("torchvision ")
    finally:
        jpeg._decoder.cache_clear()


def smooth(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 5 % 256, y * 9 % 256, (x + y) * 3 % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 17), (7, 40), (224, 150)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 75, "subsampling": 0},
        {"quality": 30, "subsampling": 1},
        {"progressive": True},
        {"optimize": True, "restart_marker_blocks": 2},
        {"keep_rgb": True},
        {"icc_profile": b"p" * 70_000, "comment": b"a comment"},
    ],
    ids=str,
)
def test_plain_colour_files_have_the_pixels_of_pillow(size: tuple[int, int], options: dict[str, Any]) -> None:
    for pixels in (noise(3, *size), smooth(*size)):
        data = encoded(pixels, "JPEG", **options)
        found = decode_plain(data, 3, MAX_PIXELS)
        if found is None:
            assert "keep_rgb" in options, "the quick decoder is not used: its speed is lost"
        else:
            assert np.array_equal(found, by_pillow(data))


def test_gray_files_have_the_pixels_of_pillow() -> None:
    data = encoded(noise(4, 21, 13, 1), "JPEG")
    found = decode_plain(data, 1, MAX_PIXELS)
    assert found is not None
    assert np.array_equal(found, by_pillow(data))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_size_of_its_row_is_decoded_into_it_and_no_other(decoder: str, channels: int) -> None:
    rows = np.zeros((3, 13, 21, channels), dtype=np.uint8)
    data = encoded(noise(4, 21, 13, channels), "JPEG")
    found = decode_plain(data, channels, MAX_PIXELS, rows[1])
    if decoder == "pillow":
        assert found is None
        return
    assert found is not None and found.base is not None and np.shares_memory(found, rows[1])
    assert np.array_equal(rows[1], by_pillow(data))
    assert not rows[0].any() and not rows[2].any()
    other = encoded(noise(4, 13, 21, channels), "JPEG")
    found = decode_plain(other, channels, MAX_PIXELS, rows[2])
    assert found is not None and np.array_equal(found, by_pillow(other))
    assert not rows[2].any()


@pytest.mark.parametrize("crop", [None, lambda width, height: (0, 0, width, height // 2)])
def test_decode_fills_a_row_only_where_nothing_is_cut_and_resized(crop: Any) -> None:
    row = np.zeros((16, 16, 3), dtype=np.uint8)
    data = encoded(smooth(16, 16), "JPEG")
    found = decode(data, image_size=16, channels=3, crop=crop, plain_jpeg=decode_plain, row=row)
    assert np.array_equal(found, decode(data, image_size=16, channels=3, crop=crop))
    assert (found is row) == (crop is None)
    assert row.any() == (crop is None)


def test_gray_files_are_repeated_over_three_channels_as_pillow_does() -> None:
    data = encoded(noise(4, 21, 13, 1), "JPEG")
    found = decode_plain(data, 3, MAX_PIXELS)
    assert found is not None
    assert np.array_equal(found, by_pillow(data, "RGB"))


def rotated_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def with_late_exif(data: bytes) -> bytes:
    """An EXIF segment between frame header and scan, where Pillow still finds it."""
    exif = rotated_exif()
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    at = data.index(b"\xff\xda")
    return data[:at] + segment + data[at:]


UNUSUAL = {
    "cmyk": encoded(noise(1), "JPEG", "CMYK"),
    "exif": encoded(noise(1), "JPEG", exif=rotated_exif()),
    "exif after the frame header": with_late_exif(encoded(noise(1), "JPEG")),
    "fill bytes": encoded(noise(1), "JPEG").replace(b"\xff\xdb", b"\xff\xff\xdb"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_left_to_pillow(name: str) -> None:
    data = UNUSUAL[name]
    assert decode_plain(data, 3, MAX_PIXELS) is None
    quick = decode(data, image_size=6, channels=3, plain_jpeg=decode_plain)
    assert np.array_equal(quick, decode(data, image_size=6, channels=3))


def test_a_late_exif_rotation_is_one_that_pillow_applies() -> None:
    turned = decode(UNUSUAL["exif after the frame header"], image_size=6, channels=3)
    assert not np.array_equal(turned, decode(encoded(noise(1), "JPEG"), image_size=6, channels=3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", [None, lambda width, height: (3, 2, width - 4, height - 1)])
def test_crop_and_resize_do_not_depend_on_the_decoder(channels: int, crop: Any) -> None:
    for data in (encoded(smooth(50, 31), "JPEG"), encoded(noise(2, 50, 31, 1), "JPEG")):
        for size in (16, 31, 64):
            options: dict[str, Any] = {"image_size": size, "channels": channels, "crop": crop}
            quick = decode(data, plain_jpeg=decode_plain, **options)
            assert quick.shape == (size, size, channels)
            assert np.array_equal(quick, decode(data, **options))


def test_more_pixels_than_the_limit_are_not_decoded() -> None:
    data = encoded(noise(5, 40, 30), "JPEG")
    assert plain_size(data) == (40, 30, 3)
    assert decode_plain(data, 3, 40 * 30) is not None
    assert decode_plain(data, 3, 40 * 30 - 1) is None


def test_a_file_cannot_hide_its_size_from_the_limit() -> None:
    plain = encoded(noise(6, 16, 16), "JPEG")
    frame = plain.index(b"\xff\xc0")
    huge = bytearray(plain)
    huge[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2
    innocent = plain[frame : frame + 19]
    disguises = [
        bytes(huge),
        bytes(huge[:2]) + b"\xff" + bytes(huge[2:]),
        bytes(huge[:2]) + b"\x00" + innocent + bytes(huge[2:]),
        bytes(huge[:2]) + b"\xff\x01" + bytes(huge[2:]),
        bytes(huge[:frame]) + b"\xff\xd0" + bytes(huge[frame:]),
        bytes(huge[:frame]) + b"\xff" + innocent[:2] + bytes(huge[frame + 2 :]),
    ]
    for data in disguises:
        size = plain_size(data)
        assert size is None or size[:2] == (60_000, 60_000)
        with pytest.raises(BadImage):
            decode(data, image_size=8, channels=3, plain_jpeg=decode_plain)


def test_the_head_of_the_file_before_changes_no_answer() -> None:
    dice = np.random.default_rng(1)
    plain = [encoded(smooth(24, 18), "JPEG", quality=q) for q in (50, 90)] + [encoded(noise(1, channels=1), "JPEG")]
    variants = [*plain, *UNUSUAL.values()]
    for whole in plain:
        start = whole.index(b"\xff\xda")
        variants += [whole[: start + more] for more in range(-3, 16)]
        for _ in range(50):
            data = bytearray(whole)
            data[int(dice.integers(2, start + 6))] ^= 1 << int(dice.integers(8))
            variants.append(bytes(data))
    answers = [jpeg._walked(data)[0] for data in variants]
    assert len(set(answers)) >= 4
    for i in dice.integers(0, len(variants), 3000).tolist():
        assert plain_size(variants[i]) == answers[i]


def outcome(data: bytes, **options: Any) -> bytes | None:
    try:
        return decode(data, image_size=16, channels=3, **options).tobytes()
    except BadImage:
        return None


def test_damaged_files_end_as_they_do_with_pillow_alone() -> None:
    dice = np.random.default_rng(0)
    failed = decoded = 0
    for whole in (encoded(smooth(24, 18), "JPEG"), encoded(noise(7, 24, 18), "JPEG", progressive=True)):
        damaged = [whole[:length] for length in range(0, len(whole), 11)]
        for _ in range(300):
            data = bytearray(whole)
            for at in dice.integers(2, len(whole), int(dice.integers(1, 4))):
                data[at] ^= 1 << int(dice.integers(8))
            damaged.append(bytes(data))
        for data in damaged:
            expected = outcome(data)
            assert outcome(data, plain_jpeg=decode_plain) == expected
            failed += expected is None
            decoded += expected is not None
    assert failed > 100
    assert decoded > 100


@pytest.mark.parametrize(
    ("name", "step"), [("cifar10-test.tar.gz", 20), ("tiny-imagenet20-val.tar", 5), ("imagenet-samples200.tar", 10)]
)
def test_real_images_have_the_pixels_of_pillow(name: str, step: int) -> None:
    if not (TEST_DATA / name).exists():
        pytest.skip(f"{name} is not there")
    compared = 0
    with tarfile.open(TEST_DATA / name) as tar:
        for number, member in enumerate(tar):
            content = tar.extractfile(member) if member.isfile() and number % step == 0 else None
            data = content.read() if content else b""
            found = decode_plain(data, 3, MAX_PIXELS)
            if found is not None:
                assert np.array_equal(found, by_pillow(data, "RGB")), member.name
                compared += 1
    assert compared > 10
