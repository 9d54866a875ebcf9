"""Worker processes start with an environment of their own; that of their parent stays as it was."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from orchestrator.launch.workers.environment import copying, environment_of_workers

NAMES = ("OMP_NUM_THREADS", "GLIBC_TUNABLES")


def _seen(name: str) -> str | None:
    return os.environ.get(name)


def _of_a_child() -> list[str | None]:
    with environment_of_workers({"threads_per_worker": 3}), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(_seen, NAMES)


@pytest.mark.parametrize("before", [None, "7"])
def test_a_process_started_meanwhile_has_threads_and_tunables_and_this_one_what_it_had(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    assert _of_a_child() == ["3", "glibc.cpu.x86_non_temporal_threshold=0x400000"]
    assert [os.environ.get(name) for name in NAMES] == [before, None]


def test_tunables_of_the_user_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    assert copying() == {"GLIBC_TUNABLES": "glibc.malloc.check=0"}
    assert _of_a_child() == ["3", "glibc.malloc.check=0"]
