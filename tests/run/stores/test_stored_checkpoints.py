"""Checkpoints in a store: a torn or damaged one is never loaded, wherever the upload ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hff import HeadOptions, VggOptions, build_layers, make_optimizer
from orchestrator.data.stores.run_store import RunStore
from orchestrator.errors import CheckpointError
from orchestrator.run import checkpoint
from orchestrator.run.folder import RunFolder
from orchestrator.run.stores.lease import lease_name
from orchestrator.run.stores.stored_checkpoints import Fenced, StoredCheckpoints
from tests.stores import Bucket, Door

FENCE = "token"
FILES = ["layer_00.optim.safetensors", "layer_00.safetensors", "state.json", "manifest.json"]


@pytest.fixture
def store(store: RunStore) -> RunStore:
    """With the lease of a run in it."""
    store.put(lease_name("a"), b'{"token": "token"}')
    return store


@pytest.fixture
def here(store: RunStore, tmp_path: Path) -> StoredCheckpoints:
    return StoredCheckpoints(store, "a", RunFolder(tmp_path / "here" / "a"))


@pytest.fixture
def elsewhere(store: RunStore, tmp_path: Path) -> StoredCheckpoints:
    """The same run on a machine that has nothing of it."""
    return StoredCheckpoints(store, "a", RunFolder(tmp_path / "elsewhere" / "a"))


def save(tmp_path: Path, step: int) -> Path:
    folder = RunFolder(tmp_path / "here" / "a")
    (layer,) = build_layers(VggOptions(widths=(4,)), (3, 8, 8), HeadOptions(num_classes=3), seed=step)
    optimizer = make_optimizer(layer, "adamw", lr=1e-2)
    entries = checkpoint.save_layer(
        checkpoint.temporary_folder(folder, step, 1), 0, checkpoint.layer_state(layer, optimizer)
    )
    return checkpoint.commit(folder, step, 1, {"step": step}, entries)


def found(tmp_path: Path, where: str = "elsewhere") -> list[int]:
    """The steps of that machine's checkpoints, all of them whole."""
    folder = RunFolder(tmp_path / where / "a")
    steps = checkpoint.steps_found(folder)
    assert [checkpoint.problems(checkpoint.step_folder(folder, step)) for step in steps] == [[]] * len(steps)
    return steps


def test_a_machine_that_has_nothing_gets_the_newest_as_it_was(
    here: StoredCheckpoints, elsewhere: StoredCheckpoints, tmp_path: Path
) -> None:
    for step in (1, 2):
        where = save(tmp_path, step)
        here.send_whole(step, FENCE)
    assert elsewhere.bring_newest(ours=False) == []
    copy = tmp_path / "elsewhere" / "a" / "checkpoints" / where.name
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in where.iterdir()}
    assert found(tmp_path) == [2]


def test_the_manifest_goes_up_last(here: StoredCheckpoints, before: Door, tmp_path: Path) -> None:
    save(tmp_path, 1)
    here.send_whole(1, FENCE)
    assert [path.rpartition("/")[2] for method, path in before.written if "step_" in path] == FILES


@pytest.mark.parametrize("sent", range(len(FILES)))
def test_an_upload_that_ended_anywhere_is_never_loaded(
    here: StoredCheckpoints, elsewhere: StoredCheckpoints, tmp_path: Path, sent: int
) -> None:
    save(tmp_path, 1)
    here.send_whole(1, FENCE)
    torn = save(tmp_path, 2)
    here.send(torn, 2, FILES[:sent])
    elsewhere.bring_newest(ours=False)
    assert found(tmp_path) == [1]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_in_the_store_is_named_and_the_one_before_is_used(
    here: StoredCheckpoints,
    elsewhere: StoredCheckpoints,
    bucket: Bucket,
    tmp_path: Path,
    name: str,
    damage: str,
) -> None:
    for step in (1, 2):
        where = save(tmp_path, step)
        here.send_whole(step, FENCE)
    key, whole = f"{tmp_path.name}/a/checkpoints/{where.name}/{name}", (where / name).read_bytes()
    if damage == "gone":
        bucket.delete(key)
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        bucket.put(key, whole[:middle] if damage == "cut" else flipped)
    warnings = elsewhere.bring_newest(ours=False)
    assert found(tmp_path) == [1]
    # Without its manifest a checkpoint is none, as after an upload that was torn.
    assert len(warnings) == (0 if (name, damage) == ("manifest.json", "gone") else 1)
    assert all(name in warning and where.name in warning for warning in warnings)
    assert elsewhere.problems(2, hashes=True) != []


def test_all_damaged_is_an_error_with_exit_4_and_never_a_fresh_start(
    here: StoredCheckpoints, elsewhere: StoredCheckpoints, bucket: Bucket, tmp_path: Path
) -> None:
    for step in (1, 2):
        where = save(tmp_path, step)
        here.send_whole(step, FENCE)
        bucket.put(f"{tmp_path.name}/a/checkpoints/{where.name}/state.json", b"{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole:\n  .*step_000000002: state\.json has 2 bytes"):
        elsewhere.bring_newest(ours=False)


def test_a_file_that_is_damaged_here_is_brought_again(here: StoredCheckpoints, before: Door, tmp_path: Path) -> None:
    where = save(tmp_path, 1)
    here.send_whole(1, FENCE)
    (where / "layer_00.safetensors").write_bytes(b"")
    before.asked.clear()
    assert here.bring_newest(ours=True, fence=FENCE) == []
    assert found(tmp_path, "here") == [1]
    assert [name for name, _ in before.asked if name.startswith("layer")] == ["layer_00.safetensors"], "nothing else is"


def test_what_a_dead_store_never_got_goes_up_at_the_next_start(
    here: StoredCheckpoints, elsewhere: StoredCheckpoints, tmp_path: Path
) -> None:
    save(tmp_path, 1)
    here.send_whole(1, FENCE)
    save(tmp_path, 2)
    assert here.bring_newest(ours=True, fence=FENCE) == []
    elsewhere.bring_newest(ours=False)
    assert found(tmp_path) == [2]


def test_what_is_here_of_a_run_that_went_on_elsewhere_is_removed(here: StoredCheckpoints, tmp_path: Path) -> None:
    save(tmp_path, 1)
    here.send_whole(1, FENCE)
    save(tmp_path, 2)
    here.bring_newest(ours=False)
    assert found(tmp_path, "here") == [1]


def test_other_bytes_under_the_same_step_here_are_replaced(
    here: StoredCheckpoints, elsewhere: StoredCheckpoints, tmp_path: Path
) -> None:
    where = save(tmp_path, 1)
    here.send_whole(1, FENCE)
    other = save(tmp_path / "other", 1)
    shutil.copytree(other, tmp_path / "elsewhere" / "a" / "checkpoints" / other.name)
    (tmp_path / "elsewhere" / "a" / "checkpoints" / other.name / "state.json").write_text("{}")
    elsewhere.bring_newest(ours=True)
    copy = tmp_path / "elsewhere" / "a" / "checkpoints" / where.name
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in where.iterdir()}


def test_old_ones_and_torn_ones_before_them_are_deleted_manifest_first(
    here: StoredCheckpoints, bucket: Bucket, before: Door, tmp_path: Path
) -> None:
    for step in (1, 3, 4):
        save(tmp_path, step)
        here.send_whole(step, FENCE)
    for step in (2, 5):
        here.send(save(tmp_path, step), step, FILES[:2])
    here.prune(2, 4)
    assert before.deleted[0] == [f"{tmp_path.name}/a/checkpoints/step_000000001/manifest.json"]
    assert len(before.deleted[1]) == len(FILES) - 1, "then its other files"
    kept = {name.split("/")[0] for name in bucket.names(f"{tmp_path.name}/a/checkpoints")}
    assert kept == {"step_000000003", "step_000000004", "step_000000005"}, "5 is on its way"
    assert here.steps() == [3, 4]
    here.prune(1, 3)
    assert here.steps() == [3, 4], "a later one, from which a run went back, takes no place of the one just saved"
    save(tmp_path, 6)
    here.send_whole(6, FENCE)
    here.prune(2, 6)
    assert here.steps() == [4, 6], "nor does a torn one"


def test_a_driver_that_lost_its_lease_writes_no_manifest(
    here: StoredCheckpoints, store: RunStore, tmp_path: Path
) -> None:
    save(tmp_path, 1)
    store.put(lease_name("a"), b'{"token": "another"}')
    with pytest.raises(Fenced, match="another driver has taken over this run"):
        here.send_whole(1, FENCE)
    assert here.steps() == []
