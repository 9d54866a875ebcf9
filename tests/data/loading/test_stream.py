"""Order, augmentation, decoding: functions of seed and sample, never of threads, workers or luck."""

from __future__ import annotations

import hashlib
import io
import resource
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.images.decode import BadImage, decode
from orchestrator.data.index import Index, Shard, open_index, write_index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.order import batch_bounds, epoch_order, replica_slice
from orchestrator.data.loading.stream import Batch, EvalStream, TrainStream
from orchestrator.data.packing.pack import pack
from orchestrator.data.split import hold_out, shuffled_labels, split_from_train
from orchestrator.errors import DataError


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return pack("digits", tmp_path_factory.mktemp("data") / "digits", shard_bytes=400_000)


def stream(index: Index, **options: Any) -> TrainStream:
    subset = options.pop("subset", np.arange(index.num_samples))
    defaults: dict[str, Any] = {
        "seed": 0, "lanes": 4, "window": 300, "global_batch_size": 128, "image_size": 8, "channels": 1,
        "augment": {"crop_padding": 1, "flip": True}, "labels": None, "keep_bytes": 0,
    } | options  # fmt: skip
    of_images = {name: defaults.pop(name) for name in ("image_size", "channels", "augment", "labels", "keep_bytes")}
    return TrainStream(ImageSource(index, seed=defaults["seed"], **of_images), subset, **defaults)


def content(batches: Iterator[Batch]) -> str:
    """Hash of everything that batches hold, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for part in (batch.images.numpy(), batch.labels.numpy(), batch.indices):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("n", [1, 7, 255, 1000, 5003])
@pytest.mark.parametrize("lanes", [1, 3, 48])
@pytest.mark.parametrize("window", [1, 100, 8192])
def test_an_epoch_is_a_permutation_that_seed_and_epoch_change(n: int, lanes: int, window: int) -> None:
    subset = np.arange(0, 3 * n, 3)
    order = epoch_order(subset, seed=0, epoch=0, lanes=lanes, window=window)
    assert np.array_equal(np.sort(order), subset)
    assert np.array_equal(order, epoch_order(subset, seed=0, epoch=0, lanes=lanes, window=window))
    if n > 1000:
        for seed, epoch in ((1, 0), (0, 1)):
            other = epoch_order(subset, seed=seed, epoch=epoch, lanes=lanes, window=window)
            assert (other == order).mean() < 0.2


def test_position_p_belongs_to_lane_p_modulo_lanes() -> None:
    order = epoch_order(np.arange(48_000), seed=0, epoch=0, lanes=48, window=480)
    # A lane walks contiguous blocks of 256, so neighbours in a lane are near one another far more often than not.
    jumps = np.abs(np.diff(order[5::48]))
    assert np.median(jumps) < 256
    assert np.median(np.abs(np.diff(order))) > 5_000


def test_a_million_samples_are_ordered_in_a_second() -> None:
    import time

    began = time.process_time()
    epoch_order(np.arange(1_281_167), seed=0, epoch=3, lanes=48, window=8192)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(("n", "size", "replicas"), [(103, 10, 1), (101, 10, 1), (100, 10, 2), (102, 10, 4), (5, 9, 2)])
def test_batches_divide_an_epoch_and_a_last_one_of_one_joins_the_one_before(n: int, size: int, replicas: int) -> None:
    bounds = batch_bounds(n, size)
    assert [i for a, b in bounds for i in range(a, b)] == list(range(n))
    assert all(b - a == size for a, b in bounds[:-1])
    assert len(bounds) == 1 or bounds[-1][1] - bounds[-1][0] >= 2
    for a, b in bounds:
        parts = [replica_slice(a, b, r, replicas) for r in range(replicas)]
        assert [i for x, y in parts for i in range(x, y)] == list(range(a, b))
        assert max(y - x for x, y in parts) - min(y - x for x, y in parts) <= 1


@pytest.mark.parametrize("threads", [2, 4])
def test_batches_do_not_depend_on_loader_threads(digits: Index, threads: int) -> None:
    assert content(stream(digits, loader_threads=threads).epoch(1)) == content(stream(digits).epoch(1))


def test_images_that_are_kept_are_those_that_are_decoded(digits: Index, damaged: Index) -> None:
    size = 1797 * 64
    kept, decoded = stream(digits, keep_bytes=size), stream(digits)
    for epoch in (0, 1, 4):
        assert content(kept.epoch(epoch)) == content(decoded.epoch(epoch))
    assert all(batch.decode_s == 0 for batch in kept.epoch(5)), "nothing was decoded again"
    assert all(batch.decode_s > 0 for batch in stream(digits, keep_bytes=size - 1).epoch(5))
    crops = {"augment": {"resized_crop": (0.3, 1.0)}}
    kept, decoded = stream(digits, keep_bytes=size, **crops), stream(digits, **crops)
    for epoch in (0, 1):
        assert content(kept.epoch(epoch)) == content(decoded.epoch(epoch)), "a crop is drawn anew in each epoch"
    tolerant = stream(damaged, keep_bytes=size, bad_sample_budget=0.01)
    for epoch in (0, 1):
        assert sum(len(batch.skipped) for batch in tolerant.epoch(epoch)) == 3, "bad images are counted in every epoch"


def test_an_epoch_resumes_at_any_step_with_the_same_batches(digits: Index) -> None:
    whole = list(stream(digits).epoch(2))
    for step in (0, 1, 7, len(whole) - 1):
        assert content(stream(digits).epoch(2, first_step=step)) == content(iter(whole[step:]))


def test_replicas_together_consume_what_one_reader_does(digits: Index) -> None:
    alone = list(stream(digits, global_batch_size=96).epoch(0))
    shares = [list(stream(digits, global_batch_size=96, replica=r, replicas=3).epoch(0)) for r in range(3)]
    for step, batch in enumerate(alone):
        together = np.concatenate([share[step].indices for share in shares])
        assert np.array_equal(together, batch.indices)


@pytest.mark.parametrize("size", [100, 446, 447, 2000])
def test_replicas_evaluate_every_image_once_in_as_many_batches(digits: Index, size: int) -> None:
    source = ImageSource(digits, image_size=8, channels=1)
    subset = np.arange(0, 1797, 4)
    shares = [list(EvalStream(source, subset, size, replica=r, replicas=3)) for r in range(3)]
    assert len({len(share) for share in shares}) == 1
    together = [i for batches in zip(*shares, strict=True) for batch in batches for i in batch.indices]
    assert together == subset.tolist()


def test_labels_and_pixels_are_those_of_the_index(digits: Index) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    known = {
        (tuple(np.rint(image * 255 / 16).astype(np.uint8).ravel()), int(label))
        for image, label in zip(data.images, data.target, strict=True)
    }
    seen = 0
    for batch in stream(digits, augment={}).epoch(0):
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            assert (tuple(image.ravel()), label) in known
            seen += 1
    assert seen == 1797


def test_evaluation_gives_every_sample_once_and_in_order(digits: Index) -> None:
    subset = np.arange(3, 1797, 5)
    batches = list(EvalStream(ImageSource(digits, image_size=8, channels=1), subset, 100, loader_threads=2))
    assert np.concatenate([b.indices for b in batches]).tolist() == subset.tolist()


def test_closing_a_stream_early_ends_its_threads(digits: Index) -> None:
    before = threading.active_count()
    batches = stream(digits, loader_threads=3).epoch(0)
    next(batches)
    assert threading.active_count() > before
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_the_held_out_part_is_stratified_and_always_the_same(digits: Index) -> None:
    train, val = split_from_train(digits, 0.25)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(1797))
    counts = np.bincount(digits.labels)
    assert np.bincount(digits.labels[val]).tolist() == [round(c * 0.25) for c in counts]
    assert np.array_equal(val, split_from_train(digits, 0.25)[1])
    for label in range(10):  # from all over the class: its first samples may be of one kind
        places = np.flatnonzero(np.isin(np.flatnonzero(digits.labels == label), val)) / counts[label]
        assert 0.35 < places.mean() < 0.65
    with pytest.raises(DataError, match="cannot be held out"):
        split_from_train(digits, 0.001)


def test_what_is_held_out_for_votes_is_apart_from_what_is_held_out_for_validation(digits: Index) -> None:
    train, val = split_from_train(digits, 0.25)
    rest, held = hold_out(digits, train, 0.1, purpose="vote", remedy="use more")
    assert sorted([*rest.tolist(), *held.tolist()]) == train.tolist()
    assert not set(held.tolist()) & set(val.tolist())
    counts = np.bincount(digits.labels[train])
    assert np.bincount(digits.labels[held]).tolist() == [round(c * 0.1) for c in counts]
    with pytest.raises(DataError, match=r"class '0' has 134 samples: 0.001 of them cannot be held out; use more"):
        hold_out(digits, train, 0.001, purpose="vote", remedy="use more")


def test_shuffled_labels_stay_inside_the_training_part(digits: Index) -> None:
    train, val = split_from_train(digits, 0.25)
    shuffled = shuffled_labels(digits.labels, train, seed=0)
    assert np.array_equal(shuffled[val], digits.labels[val])
    assert sorted(shuffled[train]) == sorted(digits.labels[train])
    assert (shuffled[train] == digits.labels[train]).mean() < 0.2


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    if mode == "P":
        image = image.quantize(4)
    elif mode:
        image = image.convert(mode)
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def jpeg(array: np.ndarray, mode: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, format="JPEG", quality=95, **options)
    return buffer.getvalue()


COLOUR = np.full((8, 8, 3), (200, 100, 50), dtype=np.uint8)
GRAY = np.full((8, 8), 90, dtype=np.uint8)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(COLOUR), (200, 100, 50)),
        (jpeg(COLOUR), (200, 100, 50)),
        (png(GRAY), (90, 90, 90)),
        (jpeg(GRAY), (90, 90, 90)),
        (png(COLOUR, "P"), (200, 100, 50)),
        (png(COLOUR, "RGBA"), (200, 100, 50)),
        (jpeg(COLOUR, "CMYK"), (200, 100, 50)),
        (png((GRAY.astype(np.uint16) << 8) + 17), (90, 90, 90)),
    ],
    ids=["png", "jpeg", "gray-png", "gray-jpeg", "palette", "alpha", "cmyk", "16-bit"],
)
def test_every_kind_of_image_has_its_defined_result(data: bytes, expected: tuple[int, int, int]) -> None:
    pixels = decode(data, image_size=8, channels=3)
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - expected).max() <= 4


def test_exif_rotation_is_applied() -> None:
    left_dark = np.zeros((16, 16, 3), dtype=np.uint8)
    left_dark[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    pixels = decode(jpeg(left_dark, exif=exif), image_size=16, channels=1)[:, :, 0]
    assert pixels[:6].mean() < 20
    assert pixels[10:].mean() > 235


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", jpeg(COLOUR)[:200], png(COLOUR)[:40]])
def test_what_is_no_image_is_a_bad_image(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode(data, image_size=8, channels=3)


def test_a_decompression_bomb_is_refused_from_its_header() -> None:
    header = b"IHDR" + (9_000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    chunks = [header, b"IDAT" + zlib.compress(bytes(9_001 * 9_000)), b"IEND"]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in chunks
    )
    assert len(bomb) < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match="9000 x 9000 pixels"):
        decode(bomb, image_size=8, channels=3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "kB: it was unpacked"


@pytest.fixture
def damaged(digits: Index, tmp_path: Path) -> Index:
    """The digits with the bytes of three images replaced by rubbish of the same length, hashes made to fit."""
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(digits.folder, folder)
    members = np.array(digits.members)
    for i in (5, 100, 900):
        row = members[i]
        path = folder / digits.shards[row["shard"]].name
        data = bytearray(path.read_bytes())
        rubbish = b"\x89PNG\r\n\x1a\n" + b"x" * (int(row["length"]) - 8)
        data[int(row["offset"]) : int(row["offset"]) + len(rubbish)] = rubbish
        path.write_bytes(data)
        members[i]["crc32"] = zlib.crc32(rubbish)
    shards = [
        Shard(s.name, s.bytes, hashlib.sha256((folder / s.name).read_bytes()).hexdigest(), s.samples)
        for s in digits.shards
    ]
    write_index(folder, digits.classes, shards, members, "test")
    return open_index(folder)


def test_the_others_of_a_batch_with_bad_images_keep_their_pixels_and_labels(damaged: Index, digits: Index) -> None:
    whole = content(iter([ImageSource(digits, image_size=8, channels=1).batch(np.array([4, 6, 7]))]))
    for keep_bytes in (0, 1797 * 64):
        source = ImageSource(damaged, image_size=8, channels=1, keep_bytes=keep_bytes)
        for _ in range(2):
            batch = source.batch(np.array([4, 5, 6, 100, 7]))
            assert sorted(batch.skipped) == [5, 100]
            assert content(iter([batch])) == whole


def test_bad_images_are_counted_and_left_out_within_the_budget(damaged: Index) -> None:
    batches = list(stream(damaged, bad_sample_budget=0.01).epoch(0))
    skipped = [line for batch in batches for line in batch.skipped.values()]
    assert sorted(line.split("key ")[1][:9] for line in skipped) == ["000000005", "000000100", "000000900"]
    assert sum(len(batch.indices) for batch in batches) == 1794
    assert {fault.reason for batch in batches for fault in batch.skipped.values()} == {"damaged png"}  # type: ignore[attr-defined]


def test_batches_tell_how_long_they_took(digits: Index) -> None:
    for batch in stream(digits).epoch(0):
        assert 0 < batch.decode_s < batch.load_s < 10


def test_more_bad_images_than_the_budget_allows_end_the_run_and_name_them(damaged: Index) -> None:
    with pytest.raises(DataError, match=r"2 images of this epoch cannot be decoded.*allows 1(.|\n)*key 0000"):
        list(stream(damaged).epoch(0))


def test_evaluation_tolerates_no_bad_image(damaged: Index) -> None:
    with pytest.raises(DataError, match="an image for evaluation cannot be decoded"):
        list(EvalStream(ImageSource(damaged, image_size=8, channels=1), np.arange(200), 50))


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_an_error_that_is_kept_keeps_no_threads(damaged: Index, kind: str) -> None:
    before = threading.active_count()
    if kind == "training":
        batches: Iterator[Batch] = stream(damaged, loader_threads=3, bad_sample_budget=0.0).epoch(0)
    else:
        batches = iter(
            EvalStream(ImageSource(damaged, image_size=8, channels=1), np.arange(1797), 32, loader_threads=3)
        )
    with pytest.raises(DataError) as kept:
        list(batches)
    assert kept.value is not None
    assert threading.active_count() == before


def test_decoding_in_threads_leaves_warnings_as_they_were(digits: Index) -> None:
    before = list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        list(stream(digits, loader_threads=4).epoch(0))
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before


def test_samples_without_augmentation_survive_a_batch_of_bad_images(damaged: Index) -> None:
    (batch,) = list(stream(damaged, subset=np.array([5]), global_batch_size=1, bad_sample_budget=1.0).epoch(0))
    assert batch.images.shape == (0, 1, 8, 8)
    assert len(batch.skipped) == 1
