"""A run in an object store as its driver sees it: the lease, the small files and the checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from orchestrator.data.stores.run_store import RunStore
from orchestrator.errors import CheckpointError, JobError, OrchestratorError
from orchestrator.job import paths
from orchestrator.run.folder import Lease, RunFolder, write_json
from orchestrator.run.stores.attached import DRIVE, StoreAddress
from orchestrator.run.stores.lease import StoreLease
from orchestrator.run.stores.mirror import Beside, Mirror
from orchestrator.run.stores.stored_checkpoints import StoredCheckpoints


class StoredRun:
    """The run `name` below `runs`, the URL of a store, and its folder on this machine.

    While it is entered this process is its only driver, and its small files are brought to the store every few
    seconds. Raises JobError for a store that cannot be used, OrchestratorError where another driver has the run.
    """

    def __init__(self, runs: str, name: str, say: Callable[[str], None]) -> None:
        self.url = f"{runs}/{name}"
        self.folder = RunFolder(Path(paths.runs_here(runs)) / name)
        self.store = RunStore(runs)
        self.lease = StoreLease(self.store, name, say)
        self.checkpoints = StoredCheckpoints(self.store, name, self.folder)
        self._name, self._say = name, say
        self._stack = ExitStack()
        self._mirror = Mirror(self.store, name, self.folder)

    def __enter__(self) -> StoredRun:
        self._stack.enter_context(self.lease)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None or issubclass(kind, OrchestratorError):
                self.sync()
        except (OrchestratorError, OSError) as error:
            self._say(f"warning: {error}; the same command brings what is missing to the store")
        finally:
            self._stack.close()

    def begin(self, *, fresh: bool) -> None:
        """Have the small files of the run here as the store has them, or rename the run there to begin afresh."""
        there = self.store.get(f"{self._name}/job.yaml") is not None
        if fresh and there:
            target = f"{self._name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}"
            self.store.move(self._name, target)
            self._say(f"The earlier run {self._name} is now {target} in the store.")
        if fresh or not there:
            self.folder.set_aside()  # in the second case of a run that the store does not know
        elif _same_drive(self.store, self._name, self.folder):
            self._mirror.both()
        else:
            self._mirror.renew()

    def claim(self) -> None:
        """From here on the run's files are this driver's, and are brought to the store."""
        self._mirror = Mirror(self.store, self._name, self.folder)
        write_json(self.folder.path / DRIVE, {"token": self.lease.token})
        self.store.put(f"{self._name}/{DRIVE}", (self.folder.path / DRIVE).read_bytes())
        self._stack.enter_context(Beside(self._look, self._say))

    def _look(self) -> None:
        if not self.lease.lost.is_set():
            self._mirror.both()

    def sync(self) -> None:
        """Bring the small files up to date on both sides."""
        self._look()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """What workers on other machines need is there before the block; what they left is here after it."""
        self.sync()
        try:
            yield
        finally:
            # What does not come now is told by what is missing.
            with suppress(OrchestratorError, OSError):
                self.sync()

    def refresh(self) -> list[str]:
        """Have the newest whole checkpoint here; a warning for each newer one that is not whole."""
        ours = _same_drive(self.store, self._name, self.folder)
        return self.checkpoints.bring_newest(ours=ours, fence=self.lease.token)

    def address(self) -> StoreAddress:
        """What workers need to know of the store."""
        return StoreAddress(self.store.url, self._name, self.lease.token)


def _same_drive(store: RunStore, name: str, folder: RunFolder) -> bool:
    """Whether nobody has driven the run since this machine did."""
    there, here = store.get(f"{name}/{DRIVE}"), folder.path / DRIVE
    return there is not None and here.exists() and there[0] == here.read_bytes()


def found_run(url: str) -> tuple[RunStore, str, RunFolder]:
    """The store, the name and the folder here of the run at `url`. Raises CheckpointError when there is no such run."""
    fault = paths.runs_fault(url)
    if fault:
        raise JobError(f"{paths.redacted(url)}: {fault}")
    runs, _, name = url.rstrip("/").rpartition("/")
    if runs.endswith("/") or not paths.is_safe_name(name):  # of s3://BUCKET nothing is left to be a name
        raise CheckpointError(f"{url}: not a run; give RUNS/NAME")
    store = RunStore(runs)
    if store.get(f"{name}/job.yaml") is None:
        raise CheckpointError(f"{url}: not a run (no job.yaml in it); give RUNS/NAME")
    return store, name, RunFolder(Path(paths.runs_here(runs)) / name)


def fetch_run(url: str, *, step: int | None = None, weights: bool = True) -> Path:
    """The folder on this machine with the run at `url`, as it is now: small files and, with `weights`, a checkpoint.

    That is the one of `step`, else the newest whole one. Raises CheckpointError when there is no such run.
    """
    store, name, folder = found_run(url)
    with ExitStack() as stack:
        try:
            stack.enter_context(Lease(folder))
        except JobError:
            raise
        except OrchestratorError:
            return folder.path  # it is being driven from here: its files are newer than those of the store
        ours, mirror = _same_drive(store, name, folder), Mirror(store, name, folder)
        if ours:
            mirror.pull()
        else:
            mirror.renew()
        checkpoints = StoredCheckpoints(store, name, folder)
        if step is not None:
            checkpoints.bring(step)
        elif weights:
            checkpoints.bring_newest(ours=ours)
    return folder.path
