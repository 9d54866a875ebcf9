"""The words of `orchestrator runs ...`, and runs named by folder or URL. What they need is imported when called."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from orchestrator.errors import JobError
from orchestrator.job import paths


def add_to(commands: Any) -> None:
    """Add `runs` with its actions to the subparsers of `orchestrator`."""
    runs = commands.add_parser("runs", help="list and examine runs")
    actions = runs.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("ls", help="all runs of a folder")
    listing.add_argument("folder", metavar="RUNS", nargs="?", help="default: runs/ here or in the project around")
    listing.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    for name, text in (
        ("show", "one run with its checkpoints"),
        ("verify", "check every hash of every checkpoint"),
        ("replay", "send metrics to MLflow that it missed"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("run", metavar="RUN")
        if name in ("show", "verify"):
            action.add_argument("--json", action="store_true", help="JSON instead of text")
    action = actions.add_parser("compare", help="results and differing job keys of several runs side by side")
    action.add_argument("runs", metavar="RUN", nargs="+")
    action.add_argument("--json", action="store_true", help="JSON instead of tables")
    action = actions.add_parser("rm", help="delete run folders; MLflow keeps what it has")
    action.add_argument("runs", metavar="RUN", nargs="+")
    action.add_argument("--yes", action="store_true", help="do not ask")
    action = actions.add_parser("prune", help="delete old checkpoints; the newest whole ones stay")
    action.add_argument("runs", metavar="RUN", nargs="+")
    action.add_argument("--keep", metavar="N", default="1", help="whole checkpoints to keep of each run (default 1)")
    action.add_argument("--dry-run", action="store_true", help="say what would be deleted, delete nothing")
    action.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    action.add_argument("--yes", action="store_true", help="do not ask")


def whole_number(text: str, flag: str) -> int:
    """The number of an argument. Raises JobError for anything but 1, 2, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise JobError(f"{flag}: must be a whole number >= 1, got {text!r}")
    return int(text)


def run_here(run: str, *, weights: bool = True) -> Path:
    """The folder of a run; one in a store is brought here first, with its newest checkpoint where `weights`."""
    if not paths.is_store(run):
        return run_folder(run)
    from orchestrator.run.stores.stored_run import fetch_run

    return fetch_run(run, weights=weights)


def run_folder(run: str) -> Path:
    """The folder of a run by its path, or by the bare name that `runs ls` shows: that one lies in the usual folder."""
    path = Path(run)
    usual = Path(_usual_folder())
    is_bare = len(path.parts) == 1 and path.name not in ("", "..") and not os.path.lexists(path)
    return usual / path if is_bare and usual.is_dir() else path


def _usual_folder() -> str:
    """Where jobs of the folder that we are in put their runs unless they say otherwise."""
    return "runs" if Path("runs").is_dir() else str(paths.base_folder("job.yaml") / "runs")


def call(arguments: argparse.Namespace) -> int:
    """Carry out the action; returns the exit code."""
    if arguments.action == "prune":
        from orchestrator.show.listings.prune import prune

        if any(paths.is_store(run) for run in arguments.runs):
            raise JobError("runs prune: knows folders; of a run in a store checkpoint.keep_last says what is kept")
        return prune(
            [run_folder(run) for run in arguments.runs],
            keep=whole_number(arguments.keep, "--keep"),
            dry_run=arguments.dry_run,
            confirmed=arguments.yes,
            as_json=arguments.json,
        )
    if arguments.action == "compare":
        from orchestrator.show.listings.compare import compare

        return compare([run_here(run, weights=False) for run in arguments.runs], as_json=arguments.json)
    from orchestrator.show.listings import runs, stored_runs

    if arguments.action == "replay":
        return runs.replay(run_here(arguments.run, weights=False))
    if arguments.action == "rm":
        stored = [run for run in arguments.runs if paths.is_store(run)]
        if not stored:
            return runs.rm([run_folder(run) for run in arguments.runs], confirmed=arguments.yes)
        if len(stored) < len(arguments.runs):
            raise JobError("runs rm: give folders or URLs, not both at once")
        return stored_runs.rm(stored, confirmed=arguments.yes)
    action = arguments.action
    place = (arguments.folder or _usual_folder()) if action == "ls" else arguments.run
    if paths.is_store(place):
        if action == "verify":
            return stored_runs.verify(place, as_json=arguments.json)
        return (stored_runs.ls if action == "ls" else stored_runs.show)(place, as_json=arguments.json)
    if action == "verify":
        return runs.verify(run_folder(place), as_json=arguments.json)
    if action == "ls":
        return runs.ls(Path(place), as_json=arguments.json)
    return runs.show(run_folder(place), as_json=arguments.json)
