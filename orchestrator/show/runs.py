"""`orchestrator runs ls|show|verify|replay`: what lies in a folder of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.errors import EXIT_DONE, CheckpointError, JobError
from orchestrator.run import checkpoint, tracking
from orchestrator.run.folder import RunFolder, read_json
from orchestrator.show.terminal import as_text, duration, percent


def _folder(run: Path) -> RunFolder:
    folder = RunFolder(run)
    if not folder.job.is_file():
        raise JobError(f"{run}: not a run folder (no job.yaml in it); give RUNS/NAME")
    return folder


def _state(folder: RunFolder) -> tuple[str, dict[str, Any]]:
    summary = read_json(folder.summary)
    if summary is not None:
        return str(summary["status"]), summary
    progress = read_json(folder.progress) or {}
    return f"step {progress.get('step', 0)}/{progress.get('steps_total', '?')}", {}


def ls(runs: Path) -> int:
    """All runs, one row each."""
    if not runs.is_dir():
        raise JobError(f"{runs}: no such folder of runs")
    table = Table(box=None, pad_edge=False)
    for column in ("run", "status", "val top-1", "test top-1", "images/s", "time", "attempts"):
        table.add_column(column, justify="left" if column in ("run", "status") else "right")
    for path in sorted(p.parent for p in runs.glob("*/job.yaml")):
        status, s = _state(RunFolder(path))
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
    folder = _folder(run)
    status, s = _state(folder)
    print(f"{run.name}: {status}, val top-1 {percent(s.get('val_top1'))}")
    for attempt in read_json(folder.attempts) or []:
        print(f"  attempt {attempt['attempt']}: steps {attempt['first_step']} to {attempt['last_step']}")
    for step in checkpoint.steps_found(folder):
        wrong = checkpoint.problems(checkpoint.step_folder(folder, step))
        print(f"  checkpoint at step {step}: {'valid' if not wrong else '; '.join(wrong)}")
    return EXIT_DONE


def verify(run: Path) -> int:
    """Check every hash of every checkpoint. Raises CheckpointError when one is wrong."""
    folder = _folder(run)
    steps = checkpoint.steps_found(folder)
    damaged = []
    for step in steps:
        where = checkpoint.step_folder(folder, step)
        damaged += [f"{where.name}: {problem}" for problem in checkpoint.problems(where)]
    if damaged or not steps:
        raise CheckpointError(f"{run}: " + ("\n  ".join(damaged) if damaged else "has no checkpoint"))
    print(f"{run}: {len(steps)} checkpoints, all hashes are right")
    return EXIT_DONE


def replay(run: Path) -> int:
    """Send to MLflow what it has not got yet."""
    folder = _folder(run)
    attempts = read_json(folder.attempts) or []
    saved = read_json(folder.path / "tracking.json")
    if not attempts or saved is None:
        raise JobError(f"{run}: has not been tracked")
    count = tracking.replay_all(saved["uri"], attempts[-1]["run_id"], folder.path)
    print(f"{run}: {count} events sent to {saved['uri']}")
    return EXIT_DONE
