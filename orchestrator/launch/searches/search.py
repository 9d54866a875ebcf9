"""`kind: search`: many runs, one question. Decide, announce, let Ray Tune run the trials, conclude."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import CheckpointError, Interrupted, JobError
from orchestrator.job.load import job_from_values
from orchestrator.job.network import units
from orchestrator.job.resolved import decisive, flatten, job_yaml
from orchestrator.job.search import SearchJob
from orchestrator.job.show import show
from orchestrator.launch.searches.search_board import Record, SearchBoard
from orchestrator.launch.searches.search_result import conclude
from orchestrator.launch.searches.trial import Board
from orchestrator.launch.signals import StopSignal
from orchestrator.launch.workers.ray_train import RaySession
from orchestrator.run import prepare
from orchestrator.run.datasets import open_datasets, prepare_embedded
from orchestrator.run.folder import Lease, RunFolder, read_json, write_atomically, write_json
from orchestrator.run.records import tracking
from orchestrator.search import fit, jobs

Runner = Callable[[Board], None]

# What may differ when a search goes on: where it runs, and how many trials it has when their values stay the same.
_FREE = ("name", "runs", "concurrency", "tracking")


@dataclass
class Drive:
    """What the parts of a search share."""

    search: SearchJob
    folder: RunFolder
    say: Callable[[str], None]
    origin: Path
    runner: Runner | None

    @property
    def uri(self) -> str:
        return tracking.resolve_uri(self.search.tracking.uri, Path(self.search.runs))

    @property
    def record_file(self) -> Path:
        return self.folder.path / "search.json"


def run_search(
    search: SearchJob,
    *,
    resume: str = "auto",
    summary_path: Path | None = None,
    say: Callable[[str], None] = print,
    origin: Path | None = None,
    runner: Runner | None = None,
) -> dict[str, Any]:
    """Run a search to its end and return its summary; one that was stopped or killed goes on.

    `resume` is auto, never or must. Raises the errors of orchestrator.errors; Interrupted when it was stopped.
    `runner` runs the trials instead of Ray Tune.
    """
    drive = Drive(search, RunFolder(Path(search.runs) / search.name), say, origin or Path.cwd(), runner)
    with Lease(drive.folder):
        summary = _finished(drive, resume) or _drive(drive)
    if summary_path is not None:
        write_json(summary_path, summary)
    return summary


def _finished(drive: Drive, resume: str) -> dict[str, Any] | None:
    folder, search = drive.folder, drive.search
    if resume == "never":
        replaced = folder.set_aside()
        if replaced is not None:
            drive.say(f"The earlier search {search.name} is now {replaced.name}.")
        return None
    if resume == "must" and not drive.record_file.exists():
        raise CheckpointError(
            f"{folder.path}: there is no search to go on with (--resume must); run without it to start one"
        )
    _refuse_changes(drive)
    summary: dict[str, Any] | None = read_json(folder.summary)
    if summary is None or len(summary["trials"]) < _total(search):
        return None
    drive.say(
        f"Search {search.name} is finished already ({folder.summary}). "
        "Use --resume never to run it afresh, or give it another name."
    )
    return summary


def _refuse_changes(drive: Drive) -> None:
    """Raise JobError, key by key, when this folder belongs to another search."""
    folder = drive.folder
    if not folder.job.exists():
        return
    old, new = (
        _decisive(values) for values in (yaml.safe_load(folder.job.read_text(encoding="utf-8")), _plain(drive.search))
    )
    changed = [
        f"{key}: was {show(old.get(key))}, is {show(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise JobError(
            f"{folder.path.name}: the search differs from the one that was started under this name:\n  "
            + "\n  ".join(changed)
            + "\nGive it another name, undo the change, or start afresh with --resume never."
        )


def _plain(search: SearchJob) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(job_yaml(search))
    return values


def _decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the result of a search, flat. More trials of a flat random search are a longer one, no other."""
    base = decisive({"data": {}, **values["base"]})
    longer = values["strategy"] == "flat" and values["sampler"] != "grid"
    kept = {k: v for k, v in values.items() if k not in _FREE and not (k == "samples" and longer)}
    # Paths of the space have dots themselves; each is one key with its domain.
    return flatten({**kept, "space": {}, "base": base}) | {f"space {k}": v for k, v in values["space"].items()}


def _layers(search: SearchJob) -> int | None:
    """Layers that a layerwise search settles; None for a flat one."""
    return units(job_from_values(search.base)) if search.strategy == "layerwise" else None


def _total(search: SearchJob) -> int:
    return search.trials_each * (_layers(search) or 1)


def _drive(drive: Drive) -> dict[str, Any]:
    search, folder = drive.search, drive.folder
    fit.check_offline(search)
    trials = jobs.trials_folder(search)
    prepare_embedded(search.base["data"], trials)
    open_datasets(search.base | {"runs": str(trials)})
    trials.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.job, job_yaml(search))
    kept = Record(drive.record_file)
    board = SearchBoard(
        search, kept, layers=_layers(search), uri=drive.uri, folder=folder, origin=drive.origin, say=drive.say
    )
    board.stop_file.unlink(missing_ok=True)
    _track(drive, kept)
    if board.left and drive.runner is not None:
        _until_stopped(drive, board, drive.runner)
    elif board.left:
        session = RaySession(None)
        drive.say(session.waiting)
        with session:
            _until_stopped(drive, board, _under_ray(drive, board))
    return conclude(board)


def _track(drive: Drive, kept: Record) -> None:
    """Create the parent run in MLflow, or go on in it: database and experiment are there before any trial asks."""
    search = drive.search
    flat = flatten(_decisive(_plain(search)))
    write_json(drive.folder.path / "tracking.json", {"uri": drive.uri})
    kept.run_id = tracking.create_run(
        drive.uri,
        search.tracking.experiment,
        search.name,
        params=flat,
        tags={
            "job.kind": search.kind,
            "git.commit": prepare.git_commit(drive.origin) or "unknown",
            "run.folder": str(drive.folder.path),
        },
        artifacts=Path(search.runs) / "mlartifacts",
        run_id=kept.run_id,
    )
    kept.save()


def _under_ray(drive: Drive, board: SearchBoard) -> Runner:
    """Ray Tune as a runner, as many trials at a time as the cluster holds. Raises JobError when it holds none."""
    import ray

    from orchestrator.launch.searches.ray_tune import run_trials

    search, there = drive.search, ray.cluster_resources()
    need = fit.need_of(search.base["cluster"])
    where = "the Ray cluster" if os.environ.get("RAY_ADDRESS") else "this machine"
    at_once = fit.concurrency(need, there.get("CPU", 0.0), there.get("GPU", 0.0), search.concurrency, where)
    drive.say(
        f"Search {search.name}: {board.total} trials, {board.total - board.left} of them done, {at_once} at a time "
        f"({where} has {there.get('CPU', 0.0):g} CPU, a trial needs {need.sum})"
    )

    storage, total = drive.folder.path / "tune", board.left

    def run(board: Board) -> None:
        try:
            run_trials(board, need=need, at_once=at_once, total=total, storage=storage)
        finally:
            shutil.rmtree(storage, ignore_errors=True)

    return run


def _until_stopped(drive: Drive, board: SearchBoard, runner: Runner) -> None:
    """Run the trials that are left. Raises Interrupted when the search was stopped."""

    def stop(reason: str) -> None:
        board.stop_file.touch()
        drive.say(f"{reason}: every trial saves at the end of its step and leaves (again: leave at once)")

    with StopSignal(stop):
        runner(board)
    if board.stop_file.exists():
        board.stop_file.unlink()
        tracking.finish_run(drive.uri, board.record.run_id, "KILLED", [])
        raise Interrupted(
            f"{drive.search.name} was stopped with {board.left} trials left; run the same command again to go on"
        )
