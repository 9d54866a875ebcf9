"""Objects of runs: whole or as before, replaced on condition, tried again within a limit; no message shows a key."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from orchestrator.data.stores import remote, run_store
from orchestrator.data.stores.remote import Patience
from orchestrator.data.stores.run_store import RunStore, Tag
from orchestrator.errors import JobError, OrchestratorError
from tests.stores import BUCKET, Door, Fault

HASTE = Patience(attempts=4, first_pause_s=0.01, longest_pause_s=0.02, connect_s=2.0, read_s=2.0, request_s=20.0)
LARGE = bytes(range(256)) * 4096 * 12  # 12 MiB: goes up in parts


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "Patience", lambda: HASTE)


def test_what_is_written_is_read_again_small_and_large(store: RunStore, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(LARGE)
    store.put("a/large", tmp_path / "large")
    small = store.put("a/small", b"x")
    assert store.get("a/small") == (b"x", small)
    assert store.get("a/nothing") is None
    assert {name: stored.bytes for name, stored in store.listed("a").items()} == {"large": len(LARGE), "small": 1}
    store.fetch("a/large", tmp_path / "back", len(LARGE))
    assert (tmp_path / "back").read_bytes() == LARGE


def test_a_new_object_is_made_once_and_replaced_only_in_the_version_that_is_known(store: RunStore) -> None:
    first = store.create("lease", b"1")
    assert first is not None
    assert store.create("lease", b"2") is None
    second = store.replace("lease", b"3", first)
    assert second is not None
    assert store.replace("lease", b"4", first) is None
    assert store.get("lease") == (b"3", second)
    store.delete(["lease", "never-there"])
    assert store.replace("lease", b"5", second) is None
    assert store.get("lease") is None


def test_a_folder_gets_another_name_and_its_neighbours_stay(store: RunStore) -> None:
    for name in ("a/x", "a/b/y", "ab/z"):
        store.put(name, name.encode())
    assert store.folders() == ["a", "ab"]
    store.move("a", "c")
    assert store.folders() == ["ab", "c"]
    assert sorted(store.listed("c")) == ["b/y", "x"]
    assert store.get("c/b/y") is not None


def test_more_objects_than_a_request_may_name_are_all_listed_and_deleted(
    store: RunStore, before: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_store, "_LISTED", 2)
    names = [f"many/{i}" for i in range(5)]
    for name in names:
        store.put(name, b"x")
    assert sorted(store.listed("many")) == ["0", "1", "2", "3", "4"]
    store.delete(names)
    assert store.listed("many") == {}
    assert [len(keys) for keys in before.deleted] == [2, 2, 1]


def test_what_may_pass_is_tried_again_in_every_kind_of_request(store: RunStore, before: Door, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(LARGE)
    before.faults[:] = [
        Fault(503, where="/large", times=2, method="PUT"),
        Fault("reset", where="/small", method="PUT"),
        Fault(503, where="/small"),
        Fault("reset", where="list-type", times=1),
        Fault(503, where="delete", method="POST"),
    ]
    store.put("large", tmp_path / "large")
    store.put("small", b"x")
    assert store.get("small") is not None
    assert sorted(store.listed("")) == ["large", "small"]
    store.delete(["small"])
    assert store.get("small") is None
    assert before.fired == {503: 4, "reset": 2}


def test_an_upload_that_is_cut_leaves_the_object_as_it_was(store: RunStore, before: Door, tmp_path: Path) -> None:
    store.put("a", b"old")
    before.faults[:] = [Fault("reset", where="/a", times=4, method="PUT")]
    with pytest.raises(OrchestratorError, match="given up after 4 tries in a row"):
        store.put("a", b"new")
    found = store.get("a")
    assert found is not None and found[0] == b"old"


def test_a_store_that_answers_nothing_is_given_up_within_its_limit(before: Door, tmp_path: Path) -> None:
    patience = Patience(attempts=10**6, first_pause_s=0.01, longest_pause_s=0.05)
    store = RunStore(f"s3://{BUCKET}/{tmp_path.name}", patience, limit_s=0.3)
    before.faults[:] = [Fault(503, where="/a", times=10**6, method="PUT")]
    began = time.monotonic()
    with pytest.raises(OrchestratorError, match=r"/a: given up .* status 503; run the same command again"):
        store.put("a", b"x")
    assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.parametrize("status", [401, 403])
def test_a_store_that_may_not_be_written_is_told_at_once_without_a_key(
    store: RunStore, before: Door, status: int
) -> None:
    before.faults[:] = [Fault(status, where="/a", method="PUT")]
    with pytest.raises(JobError) as told:
        store.put("a", b"x")
    assert "reading and writing is not allowed" in str(told.value)
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(told.value)
    assert "AKIATEST" not in str(told.value)
    assert before.fired == {status: 1}


def test_a_bucket_that_is_not_there_is_named(before: Door) -> None:
    store = RunStore("s3://no-such-bucket/runs")
    with pytest.raises(JobError, match=r"s3://no-such-bucket/runs/a: there is no such file \(404\); create the bucket"):
        store.put("a", b"x")
    with pytest.raises(JobError, match="create the bucket"):
        store.create("a", b"x")
    assert store.get("a") is None
    assert store.replace("a", b"x", Tag("1", None)) is None


def test_a_file_that_is_missing_here_is_not_taken_for_a_bucket_that_is_missing_there(
    store: RunStore, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        store.put("a", tmp_path / "absent")
