"""A damaged shard is an error or a counted skip, never another picture; what is known to be bad can be left out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import command
from orchestrator.data.index import Index, open_index
from orchestrator.data.loading.image_source import ImageSource
from orchestrator.data.loading.stream import EvalStream, TrainStream
from orchestrator.data.packing.pack import pack
from orchestrator.data.quarantine import FILE, quarantined
from orchestrator.data.verify import problems
from orchestrator.errors import DataError
from tests.conftest import Command
from tests.data.conftest import PNG_END, encoded, noise, write_tar


def source_of(index: Index) -> ImageSource:
    return ImageSource(index, image_size=9, channels=3)


def training(index: Index, budget: float = 0.0) -> TrainStream:
    everything = np.arange(index.num_samples)
    settings = {"seed": 0, "lanes": 2, "window": 8, "global_batch_size": 5}
    return TrainStream(source_of(index), everything, **settings, bad_sample_budget=budget)


def seen(index: Index) -> dict[int, str]:
    """Every sample that the stream gives, by number, as a hash of its pixels and label; no skip is allowed."""
    found = {}
    for batch in training(index).epoch(0):
        for i, image, label in zip(batch.indices.tolist(), batch.images, batch.labels.tolist(), strict=True):
            found[i] = hashlib.sha256(image.numpy().tobytes() + bytes([label])).hexdigest()
    return found


def refusal(index: Index, right: dict[int, str]) -> str | None:
    """Why the stream refused; None when it gave just what it gives of whole shards."""
    try:
        found = seen(index)
    except DataError as error:
        return str(error)
    assert found == right
    return None


def test_every_truncation_is_an_error_of_stream_and_verify(small: Index) -> None:
    path = small.folder / small.shards[0].name
    whole = path.read_bytes()
    for length in range(0, len(whole), 512):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"{path.name}: expected {len(whole)} bytes, found {length}"):
            seen(small)
        (problem,) = problems(small)
        assert problem.text.startswith(f"{path}: expected {len(whole)} bytes, found {length}")


def test_no_flipped_byte_makes_a_silent_difference(small: Index) -> None:
    path = small.folder / small.shards[0].name
    whole, right = path.read_bytes(), seen(small)
    dice = np.random.default_rng(0)
    offsets = small.members["offset"][small.members["shard"] == 0].astype(int)
    headers = [int(dice.choice(offsets)) - 512 + int(dice.integers(512)) for _ in range(100)]
    anywhere = dice.integers(0, len(whole), 100).tolist()
    refused = 0
    for at in [*headers, *anywhere]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(dice.integers(8))
        path.write_bytes(damaged)
        told = refusal(small, right)
        refused += told is not None
        assert told is None or f"{path.name}: key 0000000" in told
        assert any(f"{path}: " in problem.text for problem in problems(small)), f"byte {at} is not noticed by verify"
    assert refused > 110, "every header of an image, and every byte of one"


def test_a_bad_sample_is_named_then_left_out_and_counted(small: Index, in_process: Command) -> None:
    path = small.folder / small.shards[0].name
    damaged = bytearray(path.read_bytes())
    damaged[int(small.members["offset"][1]) + 20] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"key 000000001: member \.png: expected CRC32"):
        seen(small)
    found = in_process("data", "verify", small.folder, "--jobs", "1")
    assert found.returncode == 3
    assert f"{path}: key 000000001: member .png: expected CRC32" in found.stderr
    assert "1 sample can be left out of training: add --fix" in found.stderr
    fixed = in_process("data", "verify", small.folder, "--fix", "--jobs", "1")
    assert fixed.returncode == 0, fixed.stderr
    assert f"1 of 12 samples were named in {FILE}" in fixed.stdout
    again = in_process("data", "verify", small.folder, "--jobs", "1")
    assert again.returncode == 0, again.stderr
    assert "are right but for 1 sample in quarantine" in again.stdout
    batches = list(training(small).epoch(0))
    skipped = {i: why for batch in batches for i, why in batch.skipped.items()}
    assert list(skipped) == [1], "counted, by number and with the reason"
    assert "in quarantine.json: " in skipped[1] and "key 000000001" in skipped[1]
    assert sorted(i for batch in batches for i in batch.indices.tolist()) == [0, *range(2, 12)]


def test_quarantine_uses_up_no_budget_but_other_faults_do(tmp_path: Path) -> None:
    files = [(f"a/{i}.png", encoded(noise(i))[:60] + PNG_END if i < 2 else encoded(noise(i))) for i in range(12)]
    index = pack(write_tar(tmp_path / "x.tar", files), tmp_path / "x")
    with pytest.raises(DataError, match="2 images of this epoch cannot be decoded"):
        list(training(index, budget=0.0001).epoch(0))
    bad = [problem.key for problem in problems(index, decode=True)]
    assert len(bad) == 2
    (index.folder / FILE).write_text(json.dumps({"index_sha256": index.sha256, "samples": {bad[0]: "cut"}}))
    assert sum(len(batch.skipped) for batch in training(index, budget=0.0001).epoch(0)) == 2
    with pytest.raises(DataError, match="1 images of this epoch cannot be decoded"):
        list(training(index).epoch(0))
    command.verify(index.folder, decode=True, fix=True, jobs=1)
    assert sorted(index.key(i) for i in quarantined(index)) == sorted(bad), "the list is added to"
    assert sum(len(batch.skipped) for batch in training(index).epoch(0)) == 2


def test_nothing_is_left_out_of_an_evaluation(small: Index) -> None:
    (small.folder / FILE).write_text(json.dumps({"index_sha256": small.sha256, "samples": {"000000003": "cut"}}))
    with pytest.raises(
        DataError, match=r"an image for evaluation cannot be decoded:\n  in quarantine\.json: cut\nevaluation.*pack"
    ):
        list(EvalStream(source_of(small), np.arange(12), 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a quarantine list: JSONDecodeError"),
        ("[]", "cannot be read as a quarantine list: TypeError"),
        ('{"index_sha256": "0", "samples": {}}', "belongs to another index"),
        ('{"index_sha256": "SHA", "samples": {"nobody": "x"}}', "key nobody is not in the index"),
    ],
)
def test_a_wrong_quarantine_list_is_refused(small: Index, content: str, message: str) -> None:
    (small.folder / FILE).write_text(content.replace("SHA", small.sha256))
    with pytest.raises(DataError, match=rf"quarantine\.json: {message}"):
        source_of(small)


def test_a_cut_shard_cannot_be_fixed(small: Index) -> None:
    path = small.folder / small.shards[1].name
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=rf"{path.name}: expected \d+ bytes, found \d+; get the shard again"):
        command.verify(small.folder, fix=True, jobs=1)
    assert not (small.folder / FILE).exists()


def test_verify_in_several_processes_finds_the_same(small: Index) -> None:
    for shard, at in zip(small.shards, (700, 1500), strict=False):
        data = bytearray((small.folder / shard.name).read_bytes())
        data[at] ^= 1
        (small.folder / shard.name).write_bytes(data)
    found = problems(open_index(small.folder))
    assert len({problem.shard for problem in found}) == 2
    assert problems(open_index(small.folder), jobs=2) == found
