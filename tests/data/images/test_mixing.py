"""Mixup and cutmix: torchvision's on the global batch, whatever the replicas, the threads and the step begun at."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from hff.randomness import derive_seed
from orchestrator.data.images.mixing import Mix, drawn, mixed, places
from orchestrator.data.index import Index, Shard, open_index, write_index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.stream import Batch, TrainStream
from orchestrator.data.packing.pack import pack


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return pack("digits", tmp_path_factory.mktemp("data") / "digits")


def batches(index: Index, start: int = 0, stop: int = 4, **options: Any) -> list[Batch]:
    source = ImageSource(index, image_size=8, channels=1, augment={"crop_padding": 1}, seed=0)
    settings: dict[str, Any] = {
        "seed": 0, "lanes": 4, "window": 300, "global_batch_size": 100, "mixing": {"mixup": 0.8, "cutmix": 1.0},
    } | options  # fmt: skip
    return list(TrainStream(source, np.arange(500), **settings).steps(start, stop))


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_a_global_batch_is_the_same_for_any_number_of_replicas(digits: Index, replicas: int) -> None:
    whole = batches(digits)
    parts = [batches(digits, replica=r, replicas=replicas) for r in range(replicas)]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        for name in ("images", "labels", "partners"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(batch, name)), name
        assert np.array_equal(np.concatenate([share.indices for share in shares]), batch.indices)
        assert {share.weight for share in shares} == {batch.weight}
    assert len({batch.weight for batch in whole}) == len(whole), "every step has a share of its own"


def test_batches_depend_neither_on_threads_nor_on_the_step_begun_at(digits: Index) -> None:
    whole, resumed = batches(digits), batches(digits, start=2, loader_threads=3)
    for ours, theirs in zip(whole[2:], resumed, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert (ours.weight, ours.partners.tolist()) == (theirs.weight, theirs.partners.tolist())


def test_mixup_is_torchvisions_of_the_same_batch(digits: Index) -> None:
    plain, made = batches(digits, mixing={}), batches(digits, mixing={"mixup": 0.8})
    for before, after in zip(plain, made, strict=True):
        expected = v2.MixUp(num_classes=10).transform(
            before.images.float(), {"labels": None, "batch_size": len(before.labels), "lam": after.weight}
        )
        torch.testing.assert_close(after.images.float(), expected, rtol=0, atol=0.501)
        assert torch.equal(after.labels, before.labels)
        assert torch.equal(after.partners, before.labels.roll(1))
        assert 0 < after.weight < 1


def test_cutmix_is_torchvisions_with_the_same_box() -> None:
    random = np.random.default_rng(0)
    own = torch.from_numpy(random.integers(0, 256, (6, 16, 12, 3), dtype=np.uint8))
    box = (0.25, 0.5, 1.0, 0.75)
    found, weight = mixed(own, own.roll(1, 0), Mix(1.0, box, 0))
    params = {"labels": None, "batch_size": 6, "box": (3, 8, 12, 12)}
    expected = v2.CutMix(num_classes=10).transform(own.permute(0, 3, 1, 2), params)
    assert torch.equal(found.permute(0, 3, 1, 2), expected)
    assert weight == pytest.approx(1 - 9 * 4 / (16 * 12))


def test_the_area_of_cutmix_has_the_share_that_was_drawn_unless_it_is_cut_off() -> None:
    boxes = [drawn({"cutmix": 1.0}, seed=0, step=step, before=0).box for step in range(300)]
    inside = [b for b in boxes if min(b[:2]) > 0 and max(b[2:]) < 1]
    assert len(inside) > 20
    for left, top, right, bottom in inside:
        assert right - left == pytest.approx(bottom - top)
    for step, box in enumerate(boxes):
        random = np.random.Generator(np.random.PCG64(derive_seed(0, "mix", step)))
        _, x, y = random.random(3)
        side = np.sqrt(1 - random.beta(1.0, 1.0))  # of a square with the rest of the area
        square = np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2])
        assert box == pytest.approx(np.clip(square, 0, 1).tolist())


def test_the_shares_of_mixup_are_those_of_its_beta_distribution() -> None:
    for alpha in (0.2, 1.0):
        weights = [drawn({"mixup": alpha}, seed=0, step=step, before=0).weight for step in range(2000)]
        assert np.mean(weights) == pytest.approx(0.5, abs=0.03)
        assert np.var(weights) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_with_both_a_coin_decides_and_without_either_nothing_is_mixed() -> None:
    both = [drawn({"mixup": 0.2, "cutmix": 1.0}, seed=1, step=step, before=0) for step in range(200)]
    assert 70 < sum(mix.box is None for mix in both) < 130
    assert drawn({"mixup": 0.0, "cutmix": 0.0}, seed=1, step=0, before=0) is None
    assert drawn({}, seed=1, step=0, before=0) is None


def test_an_image_whose_partner_cannot_be_decoded_stays_as_it_is() -> None:
    planned = np.array([9, 4, 5, 6, 7])
    own, partner = places(planned, np.array([False, True, True, False, True]))
    # Of what was decoded (4, 5, 7): 4 lost its partner 9, 5 has 4, 7 lost 6.
    assert own.tolist() == [0, 1, 2]
    assert partner.tolist() == [0, 0, 2]


def test_a_damaged_partner_of_another_replica_is_not_counted_here(small: Index) -> None:
    index = damage(small)
    options: dict[str, Any] = {"global_batch_size": 6, "lanes": 2, "window": 12, "mixing": {"mixup": 1.0}, "seed": 3}

    def made(replica: int, replicas: int) -> list[Batch]:
        source = ImageSource(index, image_size=8, channels=3, seed=0)
        stream = TrainStream(
            source, np.arange(12), replica=replica, replicas=replicas, bad_sample_budget=0.5, **options
        )
        return list(stream.epoch(0))

    whole = made(0, 1)
    shares = [made(r, 3) for r in range(3)]
    assert sum(len(b.skipped) for b in whole) == 1
    assert sum(len(b.skipped) for part in shares for b in part) == 1
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].images for part in shares]), batch.images)
        assert len(batch.images) == len(batch.labels) == len(batch.partners) == len(batch.indices)


def damage(index: Index) -> Index:
    """The same index, its sixth image rubbish of the same length, hashes made to fit."""
    members = np.array(index.members)
    row = members[5]
    rubbish = b"\x89PNG\r\n\x1a\n" + b"x" * (int(row["length"]) - 8)
    path = index.folder / index.shards[int(row["shard"])].name
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) : int(row["offset"]) + len(rubbish)] = rubbish
    path.write_bytes(data)
    members[5]["crc32"] = zlib.crc32(rubbish)
    shards = [
        Shard(s.name, s.bytes, hashlib.sha256((index.folder / s.name).read_bytes()).hexdigest(), s.samples)
        for s in index.shards
    ]
    write_index(index.folder, index.classes, shards, members, "test")
    return open_index(index.folder)


def test_one_batch_is_repeated_in_every_step_and_epoch(digits: Index) -> None:
    first, *rest = batches(digits, stop=12, repeat=True)
    assert len(np.unique(first.indices)) == 100
    for batch in rest:
        assert torch.equal(batch.images, first.images)
        assert torch.equal(batch.partners, first.partners)
        assert batch.weight == first.weight
