"""A worker of a run in a store: its folder on this machine, which the driver may not see, and its uploads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.data.stores.remote import Patience
from orchestrator.data.stores.run_store import RunStore
from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.job import paths
from orchestrator.job.own_code import is_own
from orchestrator.run import checkpoint
from orchestrator.run.context import Context
from orchestrator.run.datasets import prepare_embedded
from orchestrator.run.folder import RunFolder
from orchestrator.run.stores.mirror import Beside, Mirror
from orchestrator.run.stores.stored_checkpoints import Fenced, StoredCheckpoints
from orchestrator.storage import alone

if TYPE_CHECKING:
    from orchestrator.run.worker import Assignment

# Which drive the files of a run are of, here and in the store: so each side knows whether the other went on alone, and
# a worker that finds its driver's here sees the driver's disk.
DRIVE = ".drive.json"
_ATTACHED = ".attached"


@dataclass(frozen=True)
class StoreAddress:
    """Where a run lies in a store, and the token of the lease that its driver holds."""

    url: str
    name: str
    fence: str


@dataclass(frozen=True)
class Uploads:
    """The way of this worker's saves into the store; a fault is told, never raised, so that training goes on."""

    checkpoints: StoredCheckpoints
    folder: RunFolder
    attempt: int
    fence: str
    keep_last: int

    def send(self, step: int, names: Sequence[str]) -> str | None:
        """Upload this worker's files of a save; what went wrong."""
        where = checkpoint.step_folder(self.folder, step)
        if not where.exists():  # made whole on another machine
            where = self._own(step)
        try:
            self.checkpoints.send(where, step, names)
        except (OrchestratorError, OSError) as error:
            return str(error)
        return None

    def finish(self, step: int) -> list[str]:
        """Rank 0: make an upload count and delete old ones; what went wrong. Raises Fenced."""
        try:
            self.checkpoints.finish(step, self.fence)
            self.checkpoints.prune(self.keep_last, step)
        except Fenced:
            raise
        except (OrchestratorError, OSError) as error:
            return [str(error)]
        return []

    def clear(self, step: int) -> None:
        """Remove the files of a save that another machine made whole."""
        shutil.rmtree(self._own(step), ignore_errors=True)

    def _own(self, step: int) -> Path:
        return checkpoint.temporary_folder(self.folder, step, self.attempt)


@contextmanager
def attached(assignment: Assignment, context: Context) -> Iterator[tuple[Assignment, Uploads | None]]:
    """The assignment with places on this machine, and the uploads of a run in a store.

    Where the driver's disk is not seen from here, the run's files are brought here first, and what this worker
    writes is brought to the store while the block lasts.
    """
    address = assignment.store
    if address is None:
        yield assignment, None
        return
    folder = RunFolder(Path(paths.runs_here(address.url)) / address.name)
    store = _patient(address.url, assignment.job["cluster"]["timeout_s"])
    uploads = Uploads(
        StoredCheckpoints(store, address.name, folder),
        folder,
        assignment.attempt,
        address.fence,
        assignment.job["checkpoint"]["keep_last"],
    )
    if _reads(folder.path / DRIVE, address.fence):
        yield assignment, uploads
        return
    mirror = Mirror(store, address.name, folder)
    with alone(folder.path.with_name(f".{address.name}.attach"), lambda: False, lambda: None):
        if not _reads(folder.path / _ATTACHED, assignment.token):
            _bring(assignment, mirror, store, folder)
    leads = context.local_rank == 0
    try:
        with Beside(lambda: _look(mirror, store, folder, assignment, everything=leads), lambda _: None):
            yield _moved(assignment, folder), uploads
    finally:
        mirror.push("" if leads else "failures/")


def _patient(url: str, timeout_s: float) -> RunStore:
    """A store that gives up well before the neighbours of a worker that waits for it do."""
    patience = Patience(read_s=min(20.0, timeout_s / 8), request_s=timeout_s / 4)
    return RunStore(url, patience, limit_s=timeout_s / 4)


def _reads(path: Path, token: str) -> bool:
    return path.exists() and token in path.read_text(encoding="utf-8")


def _bring(assignment: Assignment, mirror: Mirror, store: RunStore, folder: RunFolder) -> None:
    """What this attempt reads: the small files, the embedded data, the checkpoint. Raises CheckpointError."""
    folder.path.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_leftovers(folder)
    mirror.renew()
    prepare_embedded(assignment.job["data"], folder.path.parent)
    if assignment.resume_from is not None:
        source = _here(assignment.resume_from, folder)
        run = RunFolder(source.parents[1])
        wrong = StoredCheckpoints(store, run.path.name, run).bring(checkpoint.step_of(source))
        if wrong:
            raise CheckpointError(f"{store.url}/{run.path.name}: {source.name}: {'; '.join(wrong)}")
    (folder.path / _ATTACHED).write_text(assignment.token, encoding="utf-8")


def _here(path: str, folder: RunFolder) -> Path:
    """Where RUN/checkpoints/STEP of another machine lies on this one."""
    return folder.path.parent.joinpath(*Path(path).parts[-3:])


def _moved(assignment: Assignment, folder: RunFolder) -> Assignment:
    job: dict[str, Any] = {**assignment.job, "runs": str(folder.path.parent)}
    for key, copy in folder.own_code.items():
        if is_own(job[key]):
            job[key] = {**job[key], "file": str(copy)}
    source = assignment.resume_from
    resume_from = None if source is None else str(_here(source, folder))
    return replace(assignment, job=job, run_dir=str(folder.path), resume_from=resume_from)


def _look(mirror: Mirror, store: RunStore, folder: RunFolder, assignment: Assignment, *, everything: bool) -> None:
    """Bring what this machine wrote to the store, and the driver's wish to stop here."""
    if everything:
        mirror.push()
        stop = folder.stop_file(assignment.attempt)
        if not stop.exists() and store.get(f"{folder.path.name}/{stop.name}") is not None:
            stop.touch()
