"""`orchestrator runs ls|show|verify|replay|rm`: what lies in a folder of runs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.errors import EXIT_DONE, CheckpointError, JobError, OrchestratorError
from orchestrator.job.show import counted
from orchestrator.run import checkpoint, tracking
from orchestrator.run.folder import Lease, RunFolder, existing_run, read_json
from orchestrator.show.terminal import amount, as_text, duration, percent

_ACCURACIES = {"val_top1": "val top-1", "test_top1": "test top-1"}


def run_state(folder: RunFolder) -> tuple[str, dict[str, Any]]:
    """How far a run is, in words, and its summary; empty without one."""
    summary = read_json(folder.summary)
    if summary is not None:
        return str(summary["status"]), summary
    progress = read_json(folder.progress) or {}
    if not progress.get("step"):
        return "before its first step", {}
    return f"step {progress['step']}/{progress['steps_total']}", {}


def ls(runs: Path) -> int:
    """All runs, one row each."""
    if not runs.is_dir():
        raise JobError(f"{runs}: no such folder of runs")
    table = Table(box=None, pad_edge=False)
    for column in ("run", "status", "val top-1", "test top-1", "images/s", "time", "attempts"):
        table.add_column(column, justify="left" if column in ("run", "status") else "right")
    for path in sorted(p.parent for p in runs.glob("*/job.yaml")):
        status, s = run_state(RunFolder(path))
        rate = s.get("images_per_second")
        table.add_row(
            path.name,
            status,
            percent(s.get("val_top1")),
            percent(s.get("test_top1")),
            "-" if rate is None else f"{rate:.0f}",
            duration(s["wall_seconds"]) if s else "-",
            str(s.get("attempts", "-")),
        )
    print(as_text(table))
    return EXIT_DONE


def show(run: Path) -> int:
    """One run: status, attempts, checkpoints with their validity."""
    folder = existing_run(run)
    status, s = run_state(folder)
    accuracies = [f"{name} {percent(s[key])}" for key, name in _ACCURACIES.items() if s.get(key) is not None]
    print(f"{run.resolve().name}: {', '.join([status, *accuracies])}")
    for attempt in read_json(folder.attempts) or []:
        print(f"  attempt {attempt['attempt']}: steps {attempt['first_step']} to {attempt['last_step']}")
    for step in checkpoint.steps_found(folder):
        wrong = checkpoint.problems(checkpoint.step_folder(folder, step))
        print(f"  checkpoint at step {step}: {'valid' if not wrong else '; '.join(wrong)}")
    return EXIT_DONE


def verify(run: Path) -> int:
    """Check every hash of every checkpoint. Raises CheckpointError when one is wrong."""
    folder = existing_run(run)
    steps = checkpoint.steps_found(folder)
    damaged = []
    for step in steps:
        where = checkpoint.step_folder(folder, step)
        damaged += [f"{where.name}: {problem}" for problem in checkpoint.problems(where)]
    if damaged or not steps:
        raise CheckpointError(f"{run}: " + ("\n  ".join(damaged) if damaged else "has no checkpoint"))
    print(f"{run}: {counted(len(steps), 'checkpoint')}, all hashes are right")
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
        print(f"{folder.path}: {status}, {amount(_size(folder.path), 'B')}")
    if not confirmed:
        if not sys.stdin.isatty():
            raise JobError("runs rm: nobody is here to be asked; give --yes to delete without a question")
        if ask(f"Delete {'it' if len(folders) == 1 else 'them'} for good? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was deleted.")
            return EXIT_DONE
    for folder in folders:
        _remove(folder)
        print(f"Deleted: {folder.path}")
    return EXIT_DONE


def _removable(run: Path) -> RunFolder:
    if run.is_symlink():
        raise JobError(f"{run}: is a link, not a run folder; give the folder that it leads to, {run.resolve()}")
    return RunFolder(existing_run(run).path.resolve())


def _size(folder: Path) -> int:
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
