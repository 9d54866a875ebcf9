"""The end of a finished run: its result to MLflow and to the user."""

from __future__ import annotations

from typing import Any

from orchestrator.launch.drive import Drive
from orchestrator.run import checkpoint, network
from orchestrator.run.folder import read_json, write_atomically, write_json
from orchestrator.run.inference.logged_model import Logged, log_model
from orchestrator.run.inference.trained import class_names
from orchestrator.run.records import tracking
from orchestrator.run.records.description import model_card
from orchestrator.run.worker import Assignment
from orchestrator.show.pace import pace
from orchestrator.show.pages.plots import accuracy_plot
from orchestrator.show.terminal import result_table, stages_table


def conclude(drive: Drive, assignment: Assignment) -> dict[str, Any]:
    """Log the finished run, show its result and return its summary."""
    if drive.stored is not None:
        drive.stored.refresh()
    folder = drive.folder
    summary: dict[str, Any] = read_json(folder.summary)
    write_json(
        folder.attempts,
        [
            {"attempt": i + 1, "first_step": a, "last_step": b, "run_id": assignment.run_id}
            for i, (a, b) in enumerate(summary["attempt_steps"])
        ],
    )
    events, _ = folder.read_events()
    plan: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "plan"), {})
    parameters = sum(stage["parameters"] for stage in plan.get("stages", []))
    card = model_card(summary, drive.values, class_names(folder, drive.values), parameters)
    write_atomically(folder.card, card)
    _log_result(drive, assignment, events, card)
    times = [event for event in events if event["event"] == "stages"]
    if times:
        drive.say(stages_table(times[-1], assignment.layer_names))
    at_once = drive.job.train.schedule == "simultaneous"  # what the plan predicts the rate of
    predicted = plan.get("images_per_second") if at_once else None
    drive.say(result_table(summary, drive.place, drive.uri, predicted=predicted))
    said = pace(events)
    if said:
        drive.say(said)
    return summary


def _log_result(drive: Drive, assignment: Assignment, events: list[dict[str, Any]], card: str) -> None:
    """Network, plot and files to MLflow, then the status; a server that is gone costs a warning."""
    folder, uri = drive.folder, drive.uri
    newest, _ = checkpoint.newest_valid(folder)
    assert newest is not None, "a finished run has saved its last step"
    plot = folder.path / "accuracy.svg"
    plot.write_text(accuracy_plot(events, assignment.layer_names), encoding="utf-8")
    logged = Logged()
    if assignment.phases is None:  # the upper layers of a part of a run have learned nothing
        state = checkpoint.read_state(newest)
        description = network.description(drive.values, class_names(folder, drive.values), state)
        name = drive.job.tracking.registered_model
        logged = log_model(uri, assignment.run_id or "", newest, description, name, card)
    files = [folder.summary, folder.job, folder.card, plot]
    files += [path for path in (folder.confusion, folder.trace) if path.exists()]
    warning = tracking.finish_run(uri, assignment.run_id, "FINISHED", files) or logged.warning
    if warning:
        drive.say(f"warning: {warning}")
    elif logged.version is not None:
        drive.say(f"Registered as models:/{drive.job.tracking.registered_model}/{logged.version}")
