"""`orchestrator runs ls|show|verify|rm` for runs in an object store, given as URLs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from orchestrator.data.stores.run_store import RunStore
from orchestrator.errors import EXIT_DONE, JobError
from orchestrator.job import paths
from orchestrator.run.folder import Lease, RunFolder
from orchestrator.run.stores.lease import StoreLease
from orchestrator.run.stores.stored_checkpoints import StoredCheckpoints
from orchestrator.run.stores.stored_run import fetch_run, found_run
from orchestrator.show.listings import runs
from orchestrator.show.terminal import amount


def ls(url: str, *, as_json: bool = False) -> int:
    """All runs of a store, one row each. Raises JobError for a place that cannot be read."""
    fault = paths.runs_fault(url)
    if fault:
        raise JobError(f"{paths.redacted(url)}: {fault}")
    store = RunStore(url)
    names = [name for name in store.folders() if store.get(f"{name}/job.yaml") is not None]
    return runs.listing([RunFolder(fetch_run(f"{store.url}/{name}", weights=False)) for name in names], as_json=as_json)


def show(url: str, *, as_json: bool = False) -> int:
    """One run; its checkpoints by what is there and how large it is (`verify` reads every byte)."""
    folder = RunFolder(fetch_run(url, weights=False))
    checkpoints = _checkpoints(url)
    wrong = {step: checkpoints.problems(step, hashes=False) for step in checkpoints.files()}
    return runs.describe(folder, wrong, as_json=as_json)


def verify(url: str, *, as_json: bool = False) -> int:
    """Bring every checkpoint here and check its hashes. Raises CheckpointError when one is wrong."""
    checkpoints = _checkpoints(url)
    wrong = {f"step_{step:09d}": checkpoints.problems(step, hashes=True) for step in checkpoints.files()}
    return runs.verified(url, wrong, as_json=as_json)


def _checkpoints(url: str) -> StoredCheckpoints:
    store, name, folder = found_run(url)
    return StoredCheckpoints(store, name, folder)


def rm(urls: Sequence[str], *, confirmed: bool, ask: Callable[[str], str] = input) -> int:
    """Delete runs from their store, and their copies here; what MLflow has stays there.

    Asks unless `confirmed`. Raises JobError where nobody can be asked, CheckpointError for what is no run,
    OrchestratorError for a run that is being driven.
    """
    found = [found_run(url) for url in urls]
    for store, name, _ in found:
        size = sum(stored.bytes for stored in store.listed(name).values())
        print(f"{store.url}/{name}: {amount(size, 'B')}")
    if not runs.granted(len(found), confirmed, ask):
        return EXIT_DONE
    for store, name, folder in found:
        with Lease(folder), StoreLease(store, name, print):
            names = store.listed(name)
            # Without its job it is no run any more: an interruption leaves nothing that looks like one.
            store.delete([f"{name}/job.yaml"])
            store.delete(f"{name}/{file}" for file in names if file != "job.yaml")
            shutil.rmtree(folder.path, ignore_errors=True)
        print(f"Deleted: {store.url}/{name}")
    return EXIT_DONE
