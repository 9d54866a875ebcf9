"""The end of a finished run: its result to MLflow and to the user."""

from __future__ import annotations

from typing import Any

from orchestrator.launch.drive import Drive
from orchestrator.run import checkpoint, network, tracking
from orchestrator.run.folder import read_json, write_json
from orchestrator.run.logged_model import Logged, log_model
from orchestrator.run.trained import class_names
from orchestrator.run.worker import Assignment
from orchestrator.show.pace import pace
from orchestrator.show.plots import accuracy_plot
from orchestrator.show.terminal import result_table, stages_table


def conclude(drive: Drive, assignment: Assignment) -> dict[str, Any]:
    """Log the finished run and show its result."""
    if drive.stored is not None:
        drive.stored.refresh()
    summary: dict[str, Any] = read_json(drive.folder.summary)
    write_json(
        drive.folder.attempts,
        [
            {"attempt": i + 1, "first_step": a, "last_step": b, "run_id": assignment.run_id}
            for i, (a, b) in enumerate(summary["attempt_steps"])
        ],
    )
    _log_result(drive, assignment)
    stages = [event for event in drive.folder.read_events()[0] if event["event"] == "stages"]
    if stages:
        drive.say(stages_table(stages[-1], assignment.layer_names))
    drive.say(result_table(summary, drive.place, drive.uri))
    said = pace(drive.folder.read_events()[0])
    if said:
        drive.say(said)
    return summary


def _log_result(drive: Drive, assignment: Assignment) -> None:
    """Network, plot and files to MLflow, then the status; a server that is gone costs a warning."""
    folder, uri = drive.folder, drive.uri
    newest, _ = checkpoint.newest_valid(folder)
    assert newest is not None, "a finished run has saved its last step"
    plot = folder.path / "accuracy.svg"
    events, _ = folder.read_events()
    plot.write_text(accuracy_plot(events, assignment.layer_names), encoding="utf-8")
    logged = Logged()
    if assignment.phases is None:  # the upper layers of a part of a run have learned nothing
        state = checkpoint.read_state(newest)
        description = network.description(drive.values, class_names(folder, drive.values), state)
        name = drive.job.tracking.registered_model
        logged = log_model(uri, assignment.run_id or "", newest, description, name)
    files = [folder.summary, folder.job, plot, *([folder.trace] if folder.trace.exists() else [])]
    warning = tracking.finish_run(uri, assignment.run_id, "FINISHED", files) or logged.warning
    if warning:
        drive.say(f"warning: {warning}")
    elif logged.version is not None:
        drive.say(f"Registered as models:/{drive.job.tracking.registered_model}/{logged.version}")
