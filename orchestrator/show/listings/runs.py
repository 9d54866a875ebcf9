"""`orchestrator runs ls|show|verify|replay|rm`: what lies in a folder of runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.errors import EXIT_DONE, CheckpointError, JobError, OrchestratorError
from orchestrator.job.show import counted
from orchestrator.run import checkpoint
from orchestrator.run.folder import Lease, RunFolder, existing_run, read_json
from orchestrator.run.records import tracking
from orchestrator.show.terminal import amount, as_text, duration, percent

_ELSEWHERE = (
    "orchestrator runs ls RUNS looks elsewhere: in what a job says as `runs`, a folder (by default runs/ of its "
    "project) or s3://BUCKET/FOLDER"
)
_ACCURACIES = {"val_top1": "val top-1", "test_top1": "test top-1"}


def run_state(folder: RunFolder) -> tuple[str, dict[str, Any]]:
    """How far a run is, in words, and its summary; empty without one."""
    summary = read_json(folder.summary)
    if summary is not None:
        return str(summary["status"]), summary
    progress = read_json(folder.progress) or {}
    begun = bool(progress.get("step"))
    place = f"step {progress['step']}/{progress['steps_total']}" if begun else "before its first step"
    if folder.failure() is None:
        return place, {}
    return f"failed at {place}" if begun else f"failed {place}", {}


def last_known(folder: RunFolder) -> dict[str, Any]:
    """What an unfinished run has told so far, under the names of a summary: attempts, accuracies of its last epoch."""
    known: dict[str, Any] = {"attempts": len(read_json(folder.attempts) or []) or None}
    told = [event for event in folder.read_events()[0] if event.get("val_top1") is not None]
    if told:
        known |= {key: told[-1][key] for key in ("val_top1", "val_top5")}
        known["layers"] = [{"val_top1": top1} for top1 in told[-1]["layer_val_top1"]]
    return known


def ls(runs: Path, *, as_json: bool = False) -> int:
    """All runs, one row each, as a table or as a JSON list. Raises JobError for what is no folder of runs."""
    place = runs.absolute()
    if (runs / "job.yaml").is_file():
        raise JobError(f"{runs}: is a run itself; orchestrator runs show {runs} describes it")
    if not runs.is_dir():
        raise JobError(f"{place}: no such folder of runs; {_ELSEWHERE}")
    found = [RunFolder(path.parent) for path in runs.glob("*/job.yaml")]
    if not found and not as_json:
        print(f"No runs in {place}; {_ELSEWHERE}")
        return EXIT_DONE
    return listing(found, as_json=as_json)


def listing(folders: Sequence[RunFolder], *, as_json: bool) -> int:
    """These runs, one row each, by name."""
    rows = [_row(folder) for folder in sorted(folders, key=lambda folder: folder.path)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return EXIT_DONE
    table = Table(box=None, pad_edge=False)
    for column in ("run", "status", "val top-1", "test top-1", "images/s", "time", "attempts"):
        table.add_column(column, justify="left" if column in ("run", "status") else "right")
    for row in rows:
        rate, seconds, attempts = row["images_per_second"], row["wall_seconds"], row["attempts"]
        table.add_row(
            row["run"],
            row["status"],
            percent(row["val_top1"]),
            percent(row["test_top1"]),
            "-" if rate is None else f"{rate:.0f}",
            "-" if seconds is None else duration(seconds),
            "-" if attempts is None else str(attempts),
        )
    print(as_text(table))
    for row in rows:
        if row["error"]:
            print(f"{row['run']}: {row['error']}")
    return EXIT_DONE


def _row(folder: RunFolder) -> dict[str, Any]:
    """What a listing says of a run, of an unfinished one what is last known; what is not known yet is None."""
    status, summary = run_state(folder)
    keys = (*_ACCURACIES, "images_per_second", "wall_seconds", "attempts")
    error = None if summary else folder.failure()
    known = summary or last_known(folder)
    results = {key: known.get(key) for key in keys}
    return {"run": folder.path.resolve().name, "status": status, "error": error, **results}


def show(run: Path, *, as_json: bool = False) -> int:
    """One run: status, attempts, checkpoints with their validity; as text or as JSON."""
    folder = existing_run(run)
    wrong = {step: checkpoint.problems(checkpoint.step_folder(folder, step)) for step in checkpoint.steps_found(folder)}
    return describe(folder, wrong, as_json=as_json)


def describe(folder: RunFolder, wrong: Mapping[int, Sequence[str]], *, as_json: bool) -> int:
    """One run whose checkpoints have these problems."""
    row, attempts = _row(folder), read_json(folder.attempts) or []
    if as_json:
        checkpoints = [{"step": step, "problems": found} for step, found in wrong.items()]
        print(json.dumps({**row, "attempt_list": attempts, "checkpoints": checkpoints}, indent=1))
        return EXIT_DONE
    accuracies = [f"{name} {percent(row[key])}" for key, name in _ACCURACIES.items() if row[key] is not None]
    print(f"{row['run']}: {', '.join([row['status'], *accuracies])}")
    if row["error"]:
        print(f"  error: {row['error']}")
    for attempt in attempts:
        last = "on" if attempt["last_step"] is None else f"to {attempt['last_step']}"
        print(f"  attempt {attempt['attempt']}: steps {attempt['first_step']} {last}")
    for step, found in wrong.items():
        print(f"  checkpoint at step {step}: {'; '.join(found) or 'valid'}")
    return EXIT_DONE


def verify(run: Path, *, as_json: bool = False) -> int:
    """Check every hash of every checkpoint. Raises CheckpointError when one is wrong."""
    folder = existing_run(run)
    where = [checkpoint.step_folder(folder, step) for step in checkpoint.steps_found(folder)]
    return verified(str(run), {path.name: checkpoint.problems(path) for path in where}, as_json=as_json)


def verified(run: str, wrong: Mapping[str, Sequence[str]], *, as_json: bool) -> int:
    """Say that all checkpoints are right. Raises CheckpointError for those that are not, by name, and for none."""
    if as_json:
        print(json.dumps({"run": run, "checkpoints": [{"name": n, "problems": p} for n, p in wrong.items()]}, indent=1))
    damaged = [f"{name}: {problem}" for name, found in wrong.items() for problem in found]
    if damaged or not wrong:
        raise CheckpointError(f"{run}: " + ("\n  ".join(damaged) if damaged else "has no checkpoint"))
    if not as_json:
        print(f"{run}: {counted(len(wrong), 'checkpoint')}, all hashes are right")
    return EXIT_DONE


def replay(run: Path) -> int:
    """Send to MLflow what it has not got yet."""
    folder = existing_run(run)
    attempts = read_json(folder.attempts) or []
    saved = read_json(folder.path / "tracking.json")
    if not attempts or saved is None:
        raise JobError(f"{run}: has not been tracked")
    count = tracking.replay_all(saved["uri"], attempts[-1]["run_id"], folder.path)
    print(f"{run}: {counted(count, 'event')} sent to {saved['uri']}")
    return EXIT_DONE


def rm(runs: Sequence[Path], *, confirmed: bool, ask: Callable[[str], str] = input) -> int:
    """Delete run folders with their checkpoints, and nothing beside them; what MLflow has stays there.

    Asks unless `confirmed`. Raises JobError for a link and where nobody can be asked, CheckpointError for what is no
    run folder, OrchestratorError for a run that is being driven; then nothing of that run is deleted.
    """
    folders = [_removable(run) for run in runs]
    for folder in folders:
        status, _ = run_state(folder)
        print(f"{folder.path}: {status}, {amount(size_of(folder.path), 'B')}")
    if not granted(len(folders), confirmed, ask):
        return EXIT_DONE
    for folder in folders:
        _remove(folder)
        print(f"Deleted: {folder.path}")
    return EXIT_DONE


def granted(count: int, confirmed: bool, ask: Callable[[str], str]) -> bool:
    """Whether the user wants runs deleted. Raises JobError where nobody can be asked."""
    if not confirmed:
        if not sys.stdin.isatty():
            raise JobError("runs rm: nobody is here to be asked; give --yes to delete without a question")
        if ask(f"Delete {'it' if count == 1 else 'them'} for good? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was deleted.")
            return False
    return True


def _removable(run: Path) -> RunFolder:
    if run.is_symlink():
        raise JobError(f"{run}: is a link, not a run folder; give the folder that it leads to, {run.resolve()}")
    return RunFolder(existing_run(run).path.resolve())


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _remove(folder: RunFolder) -> None:
    """Away under its name first, so that an interruption leaves no half of a run behind that looks like one."""
    doomed = folder.path.with_name(f".{folder.path.name}.deleted-{os.getpid()}")
    with Lease(folder):
        try:
            folder.path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            raise OrchestratorError(f"{folder.path}: cannot be deleted: {error}") from error
