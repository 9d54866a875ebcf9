"""Checkpoints: whole or never loaded, the newest whole one counts, and the ledger proves the order."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hff import HeadOptions, LocalLayer, VggOptions, build_layers, local_forward_backward, local_update, make_optimizer
from hff.architectures import make_head
from hff.averages import WeightAverage
from orchestrator.cli import main
from orchestrator.errors import CheckpointError, JobError, OrchestratorError
from orchestrator.run import checkpoint
from orchestrator.run.folder import Lease, RunFolder, write_json
from orchestrator.run.records.ledger import Ledger, chain
from orchestrator.show.listings import runs


def trained_layer(steps: int = 3) -> tuple[LocalLayer, torch.optim.Optimizer]:
    (layer,) = build_layers(VggOptions(widths=(4,)), (3, 8, 8), HeadOptions(num_classes=3), seed=0)
    layer.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(layer, "adamw", lr=1e-2)
    for seed in range(steps):
        step(layer, optimizer, seed)
    return layer, optimizer


def step(layer: LocalLayer, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    local_forward_backward(layer, x, torch.tensor([0, 1, 2, 1]), count=4)
    local_update(layer, optimizer)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "a")


def save(folder: RunFolder, at: int) -> Path:
    layer, optimizer = trained_layer(1)
    entries = checkpoint.save_layer(
        checkpoint.temporary_folder(folder, at, 1), 0, checkpoint.layer_state(layer, optimizer)
    )
    return checkpoint.commit(folder, at, 1, {"step": at}, entries)


def test_a_restored_layer_goes_on_bit_for_bit(folder: RunFolder) -> None:
    layer, optimizer = trained_layer()
    entries = checkpoint.save_layer(
        checkpoint.temporary_folder(folder, 3, 1), 0, checkpoint.layer_state(layer, optimizer)
    )
    where = checkpoint.commit(folder, 3, 1, {"step": 3}, entries)
    restored, its_optimizer = trained_layer(0)
    checkpoint.load_layer(where, 0, restored, its_optimizer)
    for seed in (10, 11):
        step(layer, optimizer, seed)
        step(restored, its_optimizer, seed)
    assert checkpoint.layer_sha256(restored) == checkpoint.layer_sha256(layer)
    assert sorted(p.name for p in where.iterdir()) == [
        "layer_00.optim.safetensors", "layer_00.safetensors", "manifest.json", "state.json",
    ]  # fmt: skip


class Tied(nn.Module):
    """A body with one weight under two names, and a part of it under a third."""

    def __init__(self) -> None:
        super().__init__()
        self.there = nn.Linear(8, 8)
        self.back = nn.Linear(8, 8)
        self.back.weight = self.there.weight
        self.register_buffer("rows", self.there.weight.detach()[2:4])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(self.there(x.flatten(1)))
        return y


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_a_weight_under_two_names_is_saved_and_comes_back(folder: RunFolder, apart: bool, averaged: bool) -> None:
    def tied() -> tuple[LocalLayer, torch.optim.Optimizer, WeightAverage | None]:
        torch.manual_seed(0)
        layer = LocalLayer("tied", Tied(), make_head(HeadOptions(num_classes=3), 8, 1))
        return layer, make_optimizer(layer, "adamw", lr=1e-2), WeightAverage(layer, 0.5) if averaged else None

    def taught(layer: LocalLayer, optimizer: torch.optim.Optimizer, average: WeightAverage | None, at: int) -> None:
        generator = torch.Generator().manual_seed(at)
        x = torch.randn(6, 8, generator=generator)
        local_forward_backward(layer, x, torch.arange(6) % 3, count=6)
        local_update(layer, optimizer)
        if average is not None:
            average.update(at)

    whole, restored = tied(), tied()
    taught(*whole, 0)
    entries = checkpoint.save_layer(
        checkpoint.temporary_folder(folder, 1, 1), 0, checkpoint.layer_state(*whole, apart=apart)
    )
    checkpoint.load_layer(checkpoint.commit(folder, 1, 1, {"step": 1}, entries), 0, *restored)
    assert checkpoint.layer_sha256(restored[0]) == checkpoint.layer_sha256(whole[0])
    for one in (whole, restored):
        taught(*one, 1)
    assert checkpoint.layer_sha256(restored[0]) == checkpoint.layer_sha256(whole[0])


def test_the_hash_of_a_layer_is_that_of_names_types_shapes_and_every_byte() -> None:
    layer, _ = trained_layer()
    digest = hashlib.sha256()
    for name, tensor in sorted(layer.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    assert checkpoint.layer_sha256(layer) == digest.hexdigest()


def test_the_hash_of_a_network_changes_with_the_order_of_its_layers() -> None:
    assert checkpoint.weights_sha256(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
    assert checkpoint.weights_sha256(["b", "a"]) == hashlib.sha256(b"b\na").hexdigest()


def test_of_a_step_that_is_saved_twice_the_newer_counts(folder: RunFolder) -> None:
    """A run that went back behind it comes to it again."""
    save(folder, 1)
    layer, optimizer = trained_layer(2)
    temporary = checkpoint.temporary_folder(folder, 1, 2)
    entries = checkpoint.save_layer(temporary, 0, checkpoint.layer_state(layer, optimizer))
    whole = checkpoint.commit(folder, 1, 2, {"step": 1, "attempt": 2}, entries)
    assert checkpoint.newest_valid(folder) == (whole, [])
    assert checkpoint.read_state(whole)["attempt"] == 2
    restored, _ = trained_layer(0)
    checkpoint.load_layer(whole, 0, restored)
    assert checkpoint.layer_sha256(restored) == checkpoint.layer_sha256(layer)
    assert list(folder.checkpoints.iterdir()) == [whole]


def test_no_flipped_bit_of_any_file_is_ever_loaded(folder: RunFolder) -> None:
    save(folder, 1)
    where = save(folder, 2)
    dice = np.random.default_rng(0)
    for path in sorted(where.iterdir()):
        whole = path.read_bytes()
        for _ in range(50):
            flipped = bytearray(whole)
            flipped[int(dice.integers(len(whole)))] ^= 1 << int(dice.integers(8))
            path.write_bytes(flipped)
            newest, warnings = checkpoint.newest_valid(folder)
            assert newest == checkpoint.step_folder(folder, 1)
            assert path.name in warnings[0]
        path.write_bytes(whole)
    assert checkpoint.newest_valid(folder) == (where, [])


def test_no_truncation_of_any_file_is_ever_loaded(folder: RunFolder) -> None:
    where = save(folder, 1)
    for path in sorted(where.iterdir()):
        whole = path.read_bytes()
        for length in reversed(range(len(whole))):
            os.truncate(path, length)
            assert any(path.name in problem for problem in checkpoint.problems(where)), f"{path.name} of {length} bytes"
        path.write_bytes(whole)
    assert checkpoint.problems(where) == []


def test_a_worker_of_an_attempt_that_is_over_saves_no_more(folder: RunFolder) -> None:
    whole = save(folder, 1)
    write_json(folder.attempts, [{"attempt": 1}, {"attempt": 2}])
    with pytest.raises(OrchestratorError, match="attempt 1 saves no more: attempt 2 of a has begun"):
        save(folder, 2)
    assert checkpoint.newest_valid(folder) == (whole, [])
    write_json(folder.attempts, [{"attempt": 1}])
    assert save(folder, 2).name == "step_000000002"


def test_the_newest_is_that_of_the_latest_step_whatever_the_clock_said(folder: RunFolder) -> None:
    save(folder, 9)
    newest = save(folder, 10)
    for path in (newest, *newest.iterdir()):
        os.utime(path, (0, 0))
    assert checkpoint.newest_valid(folder) == (newest, [])


def test_verify_names_every_damaged_file_and_ends_with_4(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    folder.job.write_text("name: a\n")
    for at in (1, 2, 3):
        save(folder, at)
    assert runs.verify(folder.path) == 0
    (checkpoint.step_folder(folder, 1) / "state.json").write_text("{}")
    (checkpoint.step_folder(folder, 3) / "layer_00.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        runs.verify(folder.path)
    assert caught.value.exit_code == 4
    assert "step_000000001: state.json has 2 bytes, expected" in str(caught.value)
    assert "step_000000003: layer_00.safetensors is missing" in str(caught.value)
    assert "step_000000002" not in str(caught.value)


def test_verify_as_json_lists_every_checkpoint_and_still_ends_with_4(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.path.mkdir(parents=True)
    folder.job.write_text("name: a\n")
    for at in (1, 2):
        save(folder, at)
    (checkpoint.step_folder(folder, 2) / "layer_00.safetensors").unlink()
    assert main(["runs", "verify", str(folder.path), "--json"]) == 4
    assert json.loads(capsys.readouterr().out) == {
        "run": str(folder.path),
        "checkpoints": [
            {"name": "step_000000001", "problems": []},
            {"name": "step_000000002", "problems": ["layer_00.safetensors is missing"]},
        ],
    }


def test_when_every_checkpoint_is_damaged_nothing_starts_afresh_silently(folder: RunFolder) -> None:
    for at in (1, 2):
        (save(folder, at) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole(.|\n)*--resume never") as caught:
        checkpoint.newest_valid(folder)
    assert caught.value.exit_code == 4


def test_a_save_killed_at_any_point_before_its_rename_is_never_seen(folder: RunFolder) -> None:
    done = save(folder, 1)
    whole = save(folder, 2)
    files = sorted(whole.iterdir(), key=lambda p: p.stat().st_mtime_ns)
    for written in range(len(files) + 1):
        torn = checkpoint.temporary_folder(folder, 3, 2)
        torn.mkdir()
        for path in files[:written]:
            shutil.copy(path, torn)
        assert checkpoint.newest_valid(folder)[0] == whole
        checkpoint.remove_leftovers(folder)
        assert not torn.exists()
    assert done.exists()


def test_a_file_that_a_killed_process_was_about_to_replace_leaves_nothing(folder: RunFolder) -> None:
    whole = save(folder, 1)
    torn = folder.path / ".progress.json.4711-1.tmp"
    torn.write_text('{"step"')
    ours = torn.with_name(f".tracked.json.{os.getpid()}-1.tmp")
    ours.touch()
    checkpoint.remove_leftovers(folder)
    assert not torn.exists()
    assert ours.exists(), "a thread of this process is writing it"
    assert checkpoint.newest_valid(folder)[0] == whole


def test_old_checkpoints_are_pruned_and_the_newest_kept(folder: RunFolder) -> None:
    for at in (1, 2, 3, 4):
        save(folder, at)
    checkpoint.prune(folder, 2, 4)
    assert checkpoint.steps_found(folder) == [3, 4]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_checkpoints_take_no_place_of_the_one_that_was_just_saved(folder: RunFolder, keep_last: int) -> None:
    for at in (90, 100, 110):
        save(folder, at)
    for at in (100, 110):
        (checkpoint.step_folder(folder, at) / "state.json").write_text("{}")
    saved = save(folder, 95)  # by a run that went back to 90
    checkpoint.prune(folder, keep_last, 95)
    assert checkpoint.newest_valid(folder)[0] == saved
    assert checkpoint.steps_found(folder) == [*([90] if keep_last == 2 else []), 95, 100, 110]


def test_a_file_that_does_not_fit_the_layer_is_named(folder: RunFolder) -> None:
    where = save(folder, 1)
    (other,) = build_layers(VggOptions(widths=(5,)), (3, 8, 8), HeadOptions(num_classes=3), seed=0)
    with pytest.raises(CheckpointError, match=r"layer_00.safetensors: does not fit layer 0"):
        checkpoint.load_layer(where, 0, other)


def test_a_ledger_restored_in_mid_epoch_ends_like_one_that_never_stopped() -> None:
    keys = [f"{i:04d}" for i in range(20)]
    whole, part = Ledger(), Ledger()
    whole.consume(keys[:8])
    whole.end_epoch()
    whole.consume(keys[8:], skipped=["0003"])
    part.consume(keys[:8])
    part.end_epoch()
    part.consume(keys[8:13], skipped=[])
    state = json.loads(json.dumps(part.state()))
    restored = Ledger.restored(state, lambda n: keys[8 : 8 + n])
    restored.consume(keys[13:], skipped=["0003"])
    for ledger in (whole, restored):
        ledger.end_epoch()
    assert restored.state() == whole.state()
    assert restored.epochs == whole.epochs
    with pytest.raises(ValueError, match="order of the samples"):
        Ledger.restored(state, lambda n: keys[7 : 7 + n])


def test_a_ledger_of_a_repeated_batch_counts_its_bad_image_each_time() -> None:
    part, batch = Ledger(), ["a", "b", "c"]
    for _ in range(2):
        part.consume(["a", "c"], skipped=["b"])
    restored = Ledger.restored(part.state(), lambda n: (batch * 9)[:n])
    assert restored.state() == part.state()


def test_the_order_is_chained_key_by_key() -> None:
    assert chain(chain("00" * 32, ["a"]), ["b", "c"]) == chain("00" * 32, ["a", "b", "c"])
    assert chain("00" * 32, ["a", "b"]) != chain("00" * 32, ["b", "a"])


def test_one_driver_per_run(folder: RunFolder) -> None:
    with Lease(folder), pytest.raises(OrchestratorError, match=r"already being driven by process \d+ on") as caught:
        Lease(folder).__enter__()
    assert caught.value.exit_code == 1
    with Lease(folder):
        pass


def test_a_driver_that_came_while_the_last_one_left_is_the_only_one(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, left = fcntl.flock, [True]

    def late(file: IO[str], how: int) -> None:
        """The one before removes its file and lets go of it between our opening and our locking."""
        if left:
            left.clear()
            os.unlink(file.name)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Lease(folder), pytest.raises(OrchestratorError, match="already being driven"):
        Lease(folder).__enter__()


def test_a_driver_that_leaves_takes_no_other_ones_lease_away(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        with pytest.raises(OrchestratorError, match="already being driven"):
            Lease(folder).__enter__()
        unlink(path, missing_ok)

    with Lease(folder):
        monkeypatch.setattr(Path, "unlink", watched)


def test_a_file_system_without_locks_is_no_other_driver(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(JobError, match=r"runs: must be a folder whose files can be locked, got .*No locks available"):
        Lease(folder).__enter__()


def test_a_replaced_run_is_renamed_not_deleted(folder: RunFolder) -> None:
    save(folder, 1)
    renamed = folder.set_aside()
    assert renamed is not None
    assert not folder.path.exists()
    assert checkpoint.newest_valid(RunFolder(renamed))[0] is not None
