"""The folder of one run: where its files lie and how they are replaced."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import CheckpointError, JobError, OrchestratorError
from orchestrator.storage import is_at
from orchestrator.storage import write_atomically as write_atomically

# Of one process: the loop and a save beside it both tell what happened.
_APPENDING = threading.Lock()


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The file's value, None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _event(line: bytes) -> dict[str, Any] | None:
    """The event of a line, None for a torn one."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


@dataclass(frozen=True)
class RunFolder:
    """RUNS/NAME and the names in it."""

    path: Path

    @property
    def job(self) -> Path:
        return self.path / "job.yaml"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def attempts(self) -> Path:
        """One entry per attempt: number, first and last step, MLflow run."""
        return self.path / "attempts.json"

    @property
    def outcome(self) -> Path:
        """How the last attempt ended: finished, interrupted or failed, and after which step."""
        return self.path / "outcome.json"

    def write_failure(self, error: str) -> None:
        """Say that the run ended with an error, after as many attempts as there are."""
        step = (read_json(self.progress) or {}).get("step")
        attempts = len(read_json(self.attempts) or [])
        write_json(self.outcome, {"attempt": attempts, "status": "failed", "step": step, "error": error})

    def failure(self) -> str | None:
        """The error that the run ended with, in one line; None where it did not or is being tried again."""
        outcome = read_json(self.outcome) or {}
        if outcome.get("status") != "failed" or outcome["attempt"] != len(read_json(self.attempts) or []):
            return None
        return str(outcome["error"])

    def unfinished(self, step: int) -> str | None:
        """A sentence where the weights of `step` are not those of a finished run."""
        if self.summary.exists():
            return None
        total = (read_json(self.progress) or {}).get("steps_total")
        return f"The run is not finished: its newest weights are of step {step}" + (f" of {total}." if total else ".")

    @property
    def confusion(self) -> Path:
        return self.path / "confusion.json"

    @property
    def superclasses(self) -> Path:
        """The super-class of every class, for each layer that learns super-classes."""
        return self.path / "superclasses.json"

    @property
    def mistakes(self) -> Path:
        """The validation images that the final network is most sure of and wrong about."""
        return self.path / "mistakes.json"

    @property
    def card(self) -> Path:
        """What its network is and how good, in words."""
        return self.path / "model-card.md"

    @property
    def probe(self) -> Path:
        """What `eval --probe` found of the run's own validation data."""
        return self.path / "probe.json"

    @property
    def own_code(self) -> dict[str, Path]:
        """The copy of the user's own code by the section of the job that names it; there where the job does."""
        return {key: self.path / f"{key}.py" for key in ("model", "objective")}

    def shared_file(self, token: str) -> Path:
        """Written by rank 0 at the start of an attempt, to see whether all workers see it."""
        return self.path / f".shared-{token}"

    @property
    def classes(self) -> Path:
        """The names of the classes in order, so that a network can be used where its data are not."""
        return self.path / "classes.json"

    @property
    def trace(self) -> Path:
        """Some steps of all ranks of the last attempt, as a Chrome trace; there where the job wants one."""
        return self.path / "trace.json"

    def stage_file(self, stage: int) -> Path:
        """What a stage does with its time now: fractions, replaced every few seconds by its first replica."""
        return self.path / "stages" / f"{stage}.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def stop_file(self, attempt: int) -> Path:
        """Its presence asks the workers of this attempt to save and leave."""
        return self.path / f"stop-{attempt}"

    def notice_file(self, attempt: int) -> Path:
        """Its presence says that the workers of this attempt were asked to leave because a node goes away."""
        return self.path / "failures" / f"attempt-{attempt}-preempted.json"

    def failure_file(self, attempt: int, rank: int) -> Path:
        return self.path / "failures" / f"attempt-{attempt}-rank-{rank}.json"

    def stacks_file(self, attempt: int, rank: int) -> Path:
        """Where each thread of a worker was when it had made no step for long."""
        return self.path / "failures" / f"attempt-{attempt}-rank-{rank}.stacks"

    def append_event(self, event: dict[str, Any]) -> None:
        """Add a line. One that a killed writer left torn is closed first; readers pass over it."""
        line = json.dumps({**event, "time": time.time()}).encode() + b"\n"
        with _APPENDING, open(self.events, "ab+") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":
                    line = b"\n" + line
            f.write(line)

    def read_events(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Events after `offset` bytes, whole lines only, and the offset behind them."""
        try:
            with open(self.events, "rb") as f:
                f.seek(offset)
                raw = f.read()
        except FileNotFoundError:
            return [], offset
        end = raw.rfind(b"\n") + 1
        return [event for line in raw[:end].splitlines() if (event := _event(line)) is not None], offset + end

    def set_aside(self) -> Path | None:
        """Rename an existing run folder, so that a new run can take its name; nothing is deleted."""
        if not self.path.exists():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for n in range(1000):
            target = self.path.with_name(f"{self.path.name}.replaced-{stamp}" + (f"-{n}" if n else ""))
            if not target.exists():
                self.path.rename(target)
                return target
        raise OrchestratorError(f"{self.path}: cannot be renamed: too many replaced folders beside it")


# How many runs a message names.
_NAMED = 8


def existing_run(path: Path) -> RunFolder:
    """The run in the folder `path`. Raises CheckpointError when it is none."""
    folder = RunFolder(path)
    if folder.job.is_file():
        return folder
    if path.exists():
        raise CheckpointError(f"{path}: not a run folder (no job.yaml in it); give RUNS/NAME")
    raise CheckpointError(f"{path}: there is no such folder; {_runs_there(path)}")


def existing_network(path: Path) -> RunFolder:
    """`existing_run`, of a run that trained one network. Raises CheckpointError for a search, naming its best trial."""
    folder = existing_run(path)
    if not (path / "search.json").is_file():
        return folder
    best = ((read_json(folder.summary) or {}).get("best") or {}).get("name")
    trial = f"its best: {path / 'trials' / best}" if best else f"they lie in {path / 'trials'}"
    raise CheckpointError(f"{path}: is a search, not one network; give one of its trials, {trial}")


def _runs_there(missing: Path) -> str:
    """What there is in the place of a run that is not."""
    place = missing.parent
    names = sorted(job.parent.name for job in place.glob("*/job.yaml"))
    if not names:
        return f"there are no runs in {place}"
    near = difflib.get_close_matches(missing.name, names, n=1)
    if near:
        return f"did you mean {place / near[0]}?"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"runs in {place}: {', '.join(names[:_NAMED])}{more}"


class Lease:
    """One driver per run: a lock that ends with the process that holds it, however that ends."""

    def __init__(self, folder: RunFolder) -> None:
        self._run, self._path = folder.path, folder.path.with_name(f".{folder.path.name}.lease")
        self._file: IO[str] | None = None

    def __enter__(self) -> Lease:
        file = self._locked()
        while not is_at(file, self._path):  # the driver before left at this moment, and its file with it
            file.close()
            file = self._locked()
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        self._file = file
        return self

    def _locked(self) -> IO[str]:
        """The file of the lease with its lock. Raises OrchestratorError where another process has it."""
        if self._run.exists() and not self._run.is_dir():
            raise JobError(f"name: must be that of a folder in runs, got {self._run}, a file; give another name")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise JobError(f"runs: must be a folder that can be written, got {self._path.parent}: {error}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise OrchestratorError(
                f"{self._path.name[1:-6]}: this run is already being driven by {holder}; "
                "stop that one first, or give this run another name"
            ) from None
        except OSError as error:  # a file system without locks
            file.close()
            raise JobError(f"runs: must be a folder whose files can be locked, got {file.name}: {error}") from None
        return file

    def __exit__(self, *exc: object) -> None:
        assert self._file is not None
        self._path.unlink(missing_ok=True)
        self._file.close()
