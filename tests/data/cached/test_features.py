"""Cached features: readable by any WebDataset reader, gathered as stored, never torn, never another recipe's."""

from __future__ import annotations

import gc
import json
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from orchestrator.data.cached.feature_store import (
    SetPlan,
    feature_key,
    is_whole,
    kept_shards,
    publish,
    samples_written,
    write_shard,
)
from orchestrator.data.cached.features import FeatureSet, FeatureSource, Layout
from orchestrator.data.index import FEATURES, Index, file_sha256, open_index
from orchestrator.data.loading.stream import EvalStream, TrainStream
from orchestrator.data.packing.in_place import index_in_place
from orchestrator.data.packing.pack import pack
from orchestrator.errors import DataError
from orchestrator.storage import alone
from tests.data.conftest import Files, write_tar

PARTS = (5, 32)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return pack("digits", tmp_path_factory.mktemp("data") / "digits", shard_bytes=400_000)


def truth(source: Index, dtype: str, view: int = 0) -> np.ndarray:
    numbers = np.random.default_rng(view).standard_normal((source.num_samples, sum(PARTS)))
    return numbers.astype(dtype)


def plan_of(source: Index, runs: Path, dtype: str = "float32", view: int = 0) -> SetPlan:
    recipe = {"source": source.sha256, "dtype": dtype, "view": view}
    return SetPlan(str(runs / feature_key(recipe)), recipe, PARTS, dtype, source.num_samples)


def make_shard(plan: SetPlan, source: Index, number: int, values: np.ndarray, **faults: Any) -> Any:
    start, stop = plan.ranges[number]
    middle = (start + stop) // 2
    batches = [(values[start:middle], faults.get("bad", {})), (values[middle:stop], {})]
    return write_shard(plan, source, number, batches)


def make_set(source: Index, runs: Path, dtype: str = "float32", view: int = 0, **faults: Any) -> FeatureSet:
    plan = plan_of(source, runs, dtype, view)
    kept_shards(plan)
    values = truth(source, dtype, view)
    publish(plan, source, [make_shard(plan, source, n, values, **faults) for n in range(len(plan.ranges))])
    return FeatureSet(plan.folder)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_webdataset_itself_reads_every_vector_under_the_key_of_its_image(
    digits: Index, tmp_path: Path, dtype: str
) -> None:
    made = make_set(digits, tmp_path, dtype)
    assert len(made.index.shards) > 2
    urls = [str(made.index.folder / shard.name) for shard in made.index.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the last shard open
        read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        gc.collect()
    expected = truth(digits, dtype)
    assert [sample["__key__"] for sample in read] == digits.keys(range(digits.num_samples))
    assert np.array_equal(np.stack([sample["npy"] for sample in read]), expected)
    assert read[0]["npy"].dtype == dtype
    assert [sample["cls"] for sample in read] == digits.labels.tolist()


def test_a_batch_is_gathered_as_it_was_stored_in_any_order_and_twice(digits: Index, tmp_path: Path) -> None:
    made = make_set(digits, tmp_path)
    expected = truth(digits, "float32")
    for seed in range(3):
        rows = np.random.default_rng(seed).integers(0, digits.num_samples, 500)
        assert np.array_equal(made.gather(rows), expected[rows])
    assert made.parts == PARTS


def test_shards_are_of_64_megabytes_or_a_sixteenth_of_the_set() -> None:
    large = Layout(15360, "float16")
    assert large.stride == 3 * 512 + 61 * 512
    assert large.shard_samples(1_281_167) * large.stride <= 64 * 2**20
    assert Layout(64, "float32").shard_samples(16_000) == 1000
    assert Layout(64, "float32").shard_samples(100) == 256
    assert Layout(2**25, "float32").shard_samples(100) == 1, "a shard has one sample at least"


def test_the_index_proves_every_shard_and_member(digits: Index, tmp_path: Path) -> None:
    made = make_set(digits, tmp_path)
    index = open_index(made.index.folder, FEATURES)
    assert index.keys(range(index.num_samples)) == digits.keys(range(digits.num_samples))
    assert np.array_equal(index.labels, digits.labels)
    for shard in index.shards:
        path = index.folder / shard.name
        assert (path.stat().st_size, file_sha256(path)) == (shard.bytes, shard.sha256)
    assert sorted(p.name for p in index.folder.iterdir()) == sorted(
        ["index.json", "members.npy", *(shard.name for shard in index.shards)]
    )


@pytest.mark.parametrize("where", [700, 3 * 512 + 12, 128])
def test_one_changed_byte_is_found_when_its_vector_is_read(digits: Index, tmp_path: Path, where: int) -> None:
    made = make_set(digits, tmp_path)
    shard = made.index.folder / made.index.shards[1].name
    with open(shard, "r+b") as file:
        file.seek(made.layout.stride + where % made.layout.stride)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    sample = made.index.shards[0].samples + 1
    fresh = FeatureSet(made.index.folder)
    fresh.gather(np.arange(sample))
    if where == 3 * 512 + 12:
        fresh.gather(np.array([sample]))  # padding behind the numbers: nobody reads it
        assert file_sha256(shard) != made.index.shards[1].sha256
        return
    with pytest.raises(DataError, match=f"{shard}: key {digits.key(sample)}: .*the features are made again"):
        fresh.gather(np.array([sample]))


def test_a_cut_shard_a_missing_one_and_another_recipe_are_no_whole_set(digits: Index, tmp_path: Path) -> None:
    plan = plan_of(digits, tmp_path)
    assert not is_whole(plan)
    made = make_set(digits, tmp_path)
    assert is_whole(plan)
    other = {**plan.recipe, "dtype": "float16"}
    assert not is_whole(SetPlan(plan.folder, other, PARTS, "float32", plan.samples))
    shard = made.index.folder / made.index.shards[2].name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    assert not is_whole(plan)
    with pytest.raises(DataError, match=f"expected {len(whole)} bytes, found {len(whole) - 512}"):
        FeatureSet(plan.folder)
    shard.unlink()
    assert not is_whole(plan)


def test_packed_images_and_features_are_not_taken_for_one_another(digits: Index, tmp_path: Path) -> None:
    made = make_set(digits, tmp_path)
    with pytest.raises(DataError, match="expected format hff-shards version 1, found hff-features version 1"):
        open_index(made.index.folder)
    with pytest.raises(DataError, match="expected format hff-features version 1, found hff-shards version 1"):
        FeatureSet(digits.folder)
    with pytest.raises(DataError, match="make it with: orchestrator data features JOB"):
        FeatureSet(tmp_path / "nowhere")


def test_finished_shards_are_kept_and_torn_ones_are_made_again(digits: Index, tmp_path: Path) -> None:
    plan = plan_of(digits, tmp_path)
    values = truth(digits, "float32")
    assert kept_shards(plan) == []
    made = [make_shard(plan, digits, n, values) for n in (0, 2, 3, 4)]
    (plan.partial / ".features-000001.tar.1-2.tmp").write_bytes(bytes(5000))
    (plan.partial / "features-000005.tar").write_bytes(bytes(9000))  # named, but without its note
    torn = plan.partial / "features-000003.tar"
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    (plan.partial / "features-000004.tar.json").write_text('{"number": 4')
    assert kept_shards(plan) == [made[0], made[1]]
    names = sorted(p.name for p in plan.partial.iterdir())
    assert names == [f"features-00000{n}.tar{end}" for n in (0, 2) for end in ("", ".json")]
    rest = [make_shard(plan, digits, n, values) for n in range(len(plan.ranges)) if n not in (0, 2)]
    publish(plan, digits, [*made[:2], *rest])
    assert np.array_equal(FeatureSet(plan.folder).gather(np.arange(digits.num_samples)), values)
    assert not plan.partial.exists()


def test_a_shard_that_fails_half_way_leaves_nothing_behind(digits: Index, tmp_path: Path) -> None:
    plan = plan_of(digits, tmp_path)
    kept_shards(plan)

    def broken() -> Iterator[Any]:
        yield truth(digits, "float32")[:10], {}
        assert samples_written(plan) <= 10
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        write_shard(plan, digits, 0, broken())
    assert list(plan.partial.iterdir()) == []


def test_a_worker_left_over_from_an_earlier_driver_cannot_write_into_a_finished_set(
    digits: Index, tmp_path: Path
) -> None:
    plan = plan_of(digits, tmp_path)
    kept_shards(plan)
    values = truth(digits, "float32")

    def late() -> Iterator[Any]:
        start, stop = plan.ranges[0]
        publish(plan, digits, [make_shard(plan, digits, n, values) for n in range(len(plan.ranges))])
        yield np.zeros((stop - start, sum(PARTS)), dtype=np.float32), {}

    with pytest.raises(DataError, match="another process has finished or removed it"):
        write_shard(plan, digits, 0, late())
    assert np.array_equal(FeatureSet(plan.folder).gather(np.arange(digits.num_samples)), values)


def test_only_one_holder_at_a_time_and_the_next_one_is_told(digits: Index, tmp_path: Path) -> None:
    plan = plan_of(digits, tmp_path)
    inside, order, waited = threading.Event(), [], []

    def second() -> None:
        inside.wait(5)
        with alone(plan.lock, lambda: False, lambda: waited.append(True)) as held:
            order.append(("second", held))

    thread = threading.Thread(target=second)
    with alone(plan.lock, lambda: False, lambda: waited.append(False)):
        thread.start()
        inside.set()
        while not waited:
            thread.join(0.01)
        order.append(("first", True))
        with alone(plan.lock, lambda: True, lambda: None) as held:
            assert not held, "who is told to stop does not wait"
    thread.join(5)
    assert order == [("first", True), ("second", True)]
    assert waited == [True]
    assert list(tmp_path.glob(".*.lock")) == []


def test_a_changed_recipe_has_another_key_and_the_order_of_its_words_does_not_matter() -> None:
    recipe = {"backbone": "resnet18", "mean": [0.5, 0.5, 0.5], "image_size": 224}
    assert feature_key(recipe) == feature_key(dict(reversed(recipe.items())))
    keys = {feature_key({**recipe, name: value}) for name, value in
            [("backbone", "resnet34"), ("mean", [0.5, 0.5, 0.25]), ("image_size", 192), ("view", 1)]}  # fmt: skip
    assert len(keys | {feature_key(recipe)}) == 5


def test_training_takes_view_e_modulo_k_in_the_order_of_the_images(digits: Index, tmp_path: Path) -> None:
    from orchestrator.data.loading.order import epoch_order

    views = [make_set(digits, tmp_path, view=v) for v in range(2)]
    subset = np.arange(0, digits.num_samples, 3)
    options: dict[str, Any] = {"seed": 7, "lanes": 4, "window": 100}
    stream = TrainStream(FeatureSource(views), subset, global_batch_size=64, **options)
    for epoch in range(3):
        order = epoch_order(subset, epoch=epoch, **options)
        batches = list(stream.epoch(epoch))
        assert np.array_equal(np.concatenate([b.indices for b in batches]), order)
        got = np.concatenate([b.images.numpy() for b in batches])
        assert np.array_equal(got, truth(digits, "float32", view=epoch % 2)[order])
        assert np.array_equal(np.concatenate([b.labels.numpy() for b in batches]), digits.labels[order])


def test_an_image_that_could_not_be_decoded_is_skipped_in_training_and_refused_in_evaluation(
    digits: Index, tmp_path: Path
) -> None:
    made = make_set(digits, tmp_path, bad={3: "shard.tar: key 000000003: empty file"})
    assert FeatureSet(made.index.folder).bad == made.bad
    subset = np.arange(256)
    stream = TrainStream(FeatureSource([made]), subset, global_batch_size=64, seed=0, lanes=4, window=1000)
    batches = list(stream.epoch(0))
    consumed = np.concatenate([b.indices for b in batches])
    assert sorted(consumed) == [i for i in range(256) if i != 3]
    assert [b.skipped for b in batches if b.skipped] == [{3: "shard.tar: key 000000003: empty file"}]
    with pytest.raises(DataError, match="an image for evaluation cannot be decoded"):
        list(EvalStream(FeatureSource([made]), subset, 64))
    assert len(list(EvalStream(FeatureSource([made]), np.arange(4, 40), 10))) == 4


def test_labels_can_be_replaced_as_for_images(digits: Index, tmp_path: Path) -> None:
    labels = (digits.labels + 1) % 10
    batch = FeatureSource([make_set(digits, tmp_path)], labels).batch(np.arange(5))
    assert batch.labels.tolist() == labels[:5].tolist()


def test_a_member_table_that_lies_about_places_is_refused(digits: Index, tmp_path: Path) -> None:
    from orchestrator.data.index import write_index

    made = make_set(digits, tmp_path)
    index = made.index
    members = np.array(index.members)
    members["offset"][5] += 512
    write_index(index.folder, index.classes, index.shards, members, "x", kind=FEATURES, extra=index.extra)
    with pytest.raises(DataError, match="its members do not lie as those of features do"):
        FeatureSet(index.folder)
    content = json.loads((index.folder / "index.json").read_text())
    content["extra"]["parts"] = [1, 36]
    (index.folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="was changed after packing"):
        FeatureSet(index.folder)


def test_a_shard_that_gets_its_name_at_this_moment_is_not_the_end(digits: Index, tmp_path: Path) -> None:
    plan = plan_of(digits, tmp_path)
    kept_shards(plan)
    make_shard(plan, digits, 0, truth(digits, "float32"))
    written = samples_written(plan)
    (plan.partial / ".features-000001.tar.7.tmp").symlink_to("gone")
    assert 0 < samples_written(plan) == written < plan.samples


def test_a_key_that_no_shard_of_features_can_hold_is_named(images: Files, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "x.tar", [("k" * 120 + ".png", images[0][1]), ("k" * 120 + ".cls", b"0")])
    source = index_in_place(tmp_path / "set")
    plan = plan_of(source, tmp_path)
    kept_shards(plan)
    with pytest.raises(DataError, match=r"key k+: .*: its features cannot be kept; set features\.cache to false"):
        make_shard(plan, source, 0, truth(source, "float32"))


def test_what_was_in_quarantine_uses_up_no_budget(digits: Index, tmp_path: Path) -> None:
    made = make_set(digits, tmp_path, bad=dict.fromkeys((3, 5), "in quarantine.json: cut"))
    settings = {"seed": 0, "lanes": 4, "window": 64, "global_batch_size": 100, "bad_sample_budget": 0.0}
    stream = TrainStream(FeatureSource([made]), np.arange(100), **settings)
    assert [len(batch.indices) for batch in stream.epoch(0)] == [98]
