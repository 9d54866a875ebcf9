"""What to do with a run of this name: start, resume, refuse, or say that it is finished."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.data.index import open_index
from orchestrator.errors import CheckpointError, DataError, JobError, OrchestratorError
from orchestrator.job.resolved import differences
from orchestrator.run import checkpoint
from orchestrator.run.datasets import Datasets
from orchestrator.run.folder import RunFolder, read_json, write_json

_INDEX_KEYS = {"train": "index_sha256", "val": "val_index_sha256"}


@dataclass(frozen=True)
class Attempt:
    """One try at a run: its number, where it starts from, and what came before."""

    number: int
    resume_from: Path | None
    earlier_steps: list[list[int]]
    run_id: str | None
    warnings: list[str]


def finished_summary(folder: RunFolder, job: dict[str, Any]) -> dict[str, Any] | None:
    """The summary when the run is done; None when there is work left. Raises JobError for another job."""
    refuse_changes(folder, job)
    summary: dict[str, Any] | None = read_json(folder.summary)
    if summary is None or summary.get("status") != "finished":
        return None
    now = _local_index(job["data"]["train"])
    if now not in (None, summary.get("index_sha256")):
        raise _other_data("train", summary.get("index_sha256"), now)
    return summary


def _local_index(place: str) -> str | None:
    """The hash of the index in a folder of this machine; None where there is none that can be read."""
    try:
        return open_index(place).sha256 if Path(place, "index.json").exists() else None
    except DataError:
        return None


_LENGTHS = ("train.epochs:", "train.steps:", "train.samples:")


def refuse_changes(folder: RunFolder, job: dict[str, Any]) -> None:
    """Raise JobError, field by field, when the run in this folder was started with another job."""
    if not folder.job.exists():
        return
    saved = yaml.safe_load(folder.job.read_text(encoding="utf-8"))
    changed = differences(saved, job)
    if changed:
        remedy = "Give the job another name, undo the change, or start afresh with --resume never."
        if any(line.startswith(_LENGTHS) for line in changed):
            remedy += (
                f"\nTo train longer, start from its weights: --set train.init_from={folder.path.name} --set name=OTHER."
            )
        raise JobError(
            f"{folder.path.name}: the job differs from the one that this run was started with:\n  "
            + "\n  ".join(changed)
            + f"\n{remedy}"
        )


def refuse_other_data(source: Path, datasets: Datasets) -> None:
    """Raise JobError where a checkpoint was trained, or selected, on other data than these: places may differ."""
    state = checkpoint.read_state(source)
    now = index_hashes(datasets)
    for name, key in _INDEX_KEYS.items():
        if key in state and state[key] != now[key]:
            raise _other_data(name, state[key], now[key])


def index_hashes(datasets: Datasets) -> dict[str, str | None]:
    """What a checkpoint's state says of the data."""
    parts = {"train": datasets.train, "val": datasets.val}
    return {_INDEX_KEYS[name]: None if part is None else part.index.sha256 for name, part in parts.items()}


def _other_data(part: str, before: str | None, now: str | None) -> JobError:
    text = (
        f"must be the data that this run was started with (index {_short(before)}), got others (index {_short(now)}); "
        "give the job another name, undo the change, or start afresh with --resume never"
    )
    return JobError(findings=[(f"data.{part}", text)])


def _short(sha256: str | None) -> str:
    return "none" if sha256 is None else f"{sha256[:12]}..."


def next_attempt(folder: RunFolder, resume: str) -> Attempt:
    """Choose the checkpoint to go on from. Raises CheckpointError where `resume` cannot be followed."""
    checkpoint.remove_leftovers(folder)
    newest, warnings = checkpoint.newest_valid(folder)
    if resume == "must" and newest is None:
        raise CheckpointError(
            f"{folder.path}: there is no checkpoint to resume from (--resume must); "
            "run without it to start from the first step"
        )
    history: list[dict[str, Any]] = read_json(folder.attempts) or []
    progress = read_json(folder.progress) or {}
    for entry in history:
        if entry["last_step"] is None:
            # That attempt was killed: what it wrote last says how far it came.
            same = progress.get("attempt") == entry["attempt"]
            entry["last_step"] = max(entry["first_step"], progress.get("step", 0) if same else 0)
    return Attempt(
        number=len(history) + 1,
        resume_from=newest,
        earlier_steps=[[e["first_step"], e["last_step"]] for e in history],
        run_id=history[-1]["run_id"] if history else None,
        warnings=warnings,
    )


def record_attempt(folder: RunFolder, attempt: Attempt, first_step: int, run_id: str | None) -> None:
    """Write attempts.json: from here on an older attempt saves no more."""
    earlier = [
        {"attempt": i + 1, "first_step": first, "last_step": last, "run_id": run_id}
        for i, (first, last) in enumerate(attempt.earlier_steps)
    ]
    now = {"attempt": attempt.number, "first_step": first_step, "last_step": None, "run_id": run_id}
    write_json(folder.attempts, [*earlier, now])


def followed_run_id(folder: RunFolder, timeout_s: float = 60.0) -> str:
    """The MLflow run of an attempt that began while it was made. Raises OrchestratorError when nobody says it."""
    until = time.monotonic() + timeout_s
    while True:
        history: list[dict[str, Any]] = read_json(folder.attempts) or []
        if history and history[-1]["run_id"] is not None:
            return str(history[-1]["run_id"])
        if time.monotonic() > until:
            raise OrchestratorError(f"{folder.attempts}: the driver did not write down its MLflow run")
        time.sleep(0.1)


def weights_source(runs: Path, init_from: str) -> Path:
    """The checkpoint that `train.init_from: RUN[@step]` names. Raises CheckpointError."""
    folder, step = RunFolder(runs / init_from.partition("@")[0]), step_of(init_from)
    if step is not None:
        where = checkpoint.step_folder(folder, step)
        wrong = checkpoint.problems(where)
        if wrong:
            raise CheckpointError(f"train.init_from: {where}: {'; '.join(wrong)}")
        return where
    newest, _ = checkpoint.newest_valid(folder)
    if newest is None:
        raise CheckpointError(f"train.init_from: {folder.path} has no checkpoint")
    return newest


def step_of(init_from: str) -> int | None:
    """The step in RUN@STEP, None without one."""
    _, _, step = init_from.partition("@")
    return int(step) if step else None


def git_commit(start: Path) -> str | None:
    """The commit of the repository that `start` lies in; None outside of one."""
    try:
        result = subprocess.run(
            ["git", "-C", str(start), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
