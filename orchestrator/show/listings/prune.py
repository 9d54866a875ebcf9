"""`orchestrator runs prune RUN...`: the room that old checkpoints take, given back."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from orchestrator.errors import EXIT_DONE, JobError, OrchestratorError
from orchestrator.job.show import counted
from orchestrator.run import checkpoint
from orchestrator.run.folder import Lease, RunFolder, existing_run
from orchestrator.show.listings.runs import run_state, size_of
from orchestrator.show.terminal import amount, as_text


@dataclass(frozen=True)
class Pruning:
    """What becomes of the checkpoints of one run, by their steps; `bytes` are those of the deleted ones."""

    run: Path
    status: str
    kept: tuple[int, ...]
    deleted: tuple[int, ...]
    bytes: int


def prune(
    runs: Sequence[Path],
    *,
    keep: int,
    dry_run: bool,
    confirmed: bool,
    as_json: bool = False,
    ask: Callable[[str], str] = input,
) -> int:
    """Delete all checkpoints before the newest `keep` whole ones of each run; asks unless `confirmed`.

    What is newer than these stays too, damaged as it is, and where none is whole nothing is deleted. Raises
    CheckpointError for what is no run folder, JobError where nobody can be asked, OrchestratorError for a run that is
    being driven.
    """
    plans = [_planned(existing_run(run), keep) for run in runs]
    if as_json:
        print(json.dumps([{**vars(plan), "run": str(plan.run)} for plan in plans], indent=1))
    else:
        print(_table(plans))
    steps = sum(len(plan.deleted) for plan in plans)
    if dry_run or not steps:
        if not as_json:
            print("Nothing was deleted (--dry-run)." if dry_run else "There is nothing to delete.")
        return EXIT_DONE
    if not confirmed:
        if not sys.stdin.isatty():
            raise JobError("runs prune: nobody is here to be asked; give --yes to delete without a question")
        if ask(f"Delete {counted(steps, 'checkpoint')} for good? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was deleted.")
            return EXIT_DONE
    for plan in plans:
        _carry_out(plan)
    if not as_json:
        print(f"Deleted: {counted(steps, 'checkpoint')}, {amount(sum(plan.bytes for plan in plans), 'B')}")
    return EXIT_DONE


def _planned(folder: RunFolder, keep: int) -> Pruning:
    steps = checkpoint.steps_found(folder)
    whole: list[int] = []
    for step in reversed(steps):  # the newest first, and no more of them read than it takes
        if len(whole) == keep:
            break
        if not checkpoint.problems(checkpoint.step_folder(folder, step)):
            whole.append(step)
    oldest = min(whole, default=-1)
    deleted = tuple(step for step in steps if step < oldest)
    return Pruning(
        run=folder.path,
        status=run_state(folder)[0],
        kept=tuple(step for step in steps if step >= oldest),
        deleted=deleted,
        bytes=sum(size_of(checkpoint.step_folder(folder, step)) for step in deleted),
    )


def _carry_out(plan: Pruning) -> None:
    folder = RunFolder(plan.run)
    if not plan.deleted:
        return
    with Lease(folder):
        for step in plan.deleted:
            try:
                # Away under the name of a leftover, so that half a checkpoint is never taken for a damaged one.
                where = checkpoint.step_folder(folder, step)
                doomed = where.with_name(f".{where.name}.pruned.tmp")
                where.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                raise OrchestratorError(f"{plan.run}: step {step} cannot be deleted: {error}") from error


def _table(plans: Sequence[Pruning]) -> str:
    table = Table(box=None, pad_edge=False)
    for column in ("run", "status", "kept", "to delete", "frees"):
        table.add_column(column, justify="left" if column in ("run", "status") else "right", overflow="fold")
    for plan in plans:
        table.add_row(
            str(plan.run), plan.status, _steps(plan.kept), _steps(plan.deleted), amount(plan.bytes, "B")
        )  # fmt: skip
    return as_text(table, width=max(110, 80 + max(len(str(plan.run)) for plan in plans)))


def _steps(steps: Sequence[int]) -> str:
    """The numbers of few steps, the number and the ends of many."""
    if len(steps) <= 3:
        return ", ".join(map(str, steps)) or "-"
    return f"{len(steps)}: {steps[0]} .. {steps[-1]}"
