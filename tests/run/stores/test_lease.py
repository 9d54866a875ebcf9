"""One driver per run wherever it is: refused while the other renews, taken over when it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from orchestrator.data.stores.run_store import RunStore
from orchestrator.errors import OrchestratorError
from orchestrator.run.stores.lease import StoreLease, holder_of, lease_name
from tests.stores import Door, Fault, wait_until

BEAT_S, STALE_S = 0.1, 0.6


def lease(store: RunStore, said: list[str] | None = None) -> StoreLease:
    return StoreLease(store, "a", (said if said is not None else []).append, beat_s=BEAT_S, stale_s=STALE_S)


def leave(store: RunStore, **changes: object) -> str:
    """The lease of a driver that wrote it once and was never heard of again; returns its token."""
    with lease(store) as other:
        found = store.get(lease_name("a"))
    assert found is not None
    store.put(lease_name("a"), json.dumps(json.loads(found[0]) | changes).encode())
    return other.token


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-S", "-c", ""])
    done.wait()
    return done.pid


def test_a_second_driver_is_refused_with_process_host_and_since_when(store: RunStore) -> None:
    said: list[str] = []
    with lease(store) as first:
        with pytest.raises(OrchestratorError) as refused, lease(store, said):
            pass
        assert f"a: this run is already being driven by process {os.getpid()} on " in str(refused.value)
        assert f" since {time.strftime('%Y-')}" in str(refused.value)
        assert refused.value.exit_code == 1
        assert holder_of(store, "a") == first.token
    assert "is process" in said[0]
    assert holder_of(store, "a") is None, "a driver that ends gives the lease back"
    with lease(store):
        pass


def test_a_lease_of_another_machine_is_stale_when_nobody_renews_it(store: RunStore) -> None:
    pid = dead_process()  # here: what it says of another machine means nothing
    leave(store, machine="elsewhere", host="far", pid=pid)
    said: list[str] = []
    began = time.monotonic()
    with lease(store, said) as mine:
        assert time.monotonic() - began >= STALE_S
        assert holder_of(store, "a") == mine.token
    assert f"process {pid} on far since" in said[0]


def test_a_lease_of_a_dead_process_of_this_machine_is_stale_at_once(store: RunStore) -> None:
    leave(store, pid=dead_process())
    said: list[str] = []
    with lease(store, said) as mine:
        assert holder_of(store, "a") == mine.token
    assert said == []


def test_a_driver_that_another_one_took_over_from_knows_it(store: RunStore) -> None:
    with lease(store) as mine:
        store.put(lease_name("a"), json.dumps({"token": "another"}).encode())
        wait_until(mine.lost.is_set)
    assert holder_of(store, "a") == "another", "what is not ours is not given back"


def test_answers_that_are_lost_on_the_way_cost_no_lease(store: RunStore, before: Door) -> None:
    before.faults[:] = [Fault("lost", where="lease", method="PUT")]
    said: list[str] = []
    with lease(store, said) as mine:
        assert said == [], "the lease that is found is its own, and not waited for"
        assert holder_of(store, "a") == mine.token
        before.faults.append(Fault("lost", where="lease", times=2, method="PUT"))
        wait_until(lambda: before.fired["lost"] == 3)
        time.sleep(3 * BEAT_S)
        assert not mine.lost.is_set()
        assert holder_of(store, "a") == mine.token


def test_a_damaged_lease_is_nobodys(store: RunStore) -> None:
    store.put(lease_name("a"), b"{")
    with lease(store) as mine:
        assert holder_of(store, "a") == mine.token
