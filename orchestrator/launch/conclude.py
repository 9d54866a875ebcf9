"""The end of a finished run: its result to MLflow and to the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.launch.drive import Drive
from orchestrator.run import checkpoint, network
from orchestrator.run.folder import RunFolder, read_json, write_atomically, write_json
from orchestrator.run.inference.logged_model import Logged, log_model
from orchestrator.run.inference.trained import class_names
from orchestrator.run.records import tracking
from orchestrator.run.records.description import model_card
from orchestrator.show.pace import pace
from orchestrator.show.pages.plots import accuracy_plot
from orchestrator.show.terminal import result_table, stages_table


def conclude(drive: Drive, run_id: str | None, names: Sequence[str]) -> dict[str, Any]:
    """Log the finished run of layers of these `names`, show its result and return its summary."""
    if drive.stored is not None:
        drive.stored.refresh()
    folder = drive.folder
    summary: dict[str, Any] = read_json(folder.summary)
    write_json(
        folder.attempts,
        [
            {"attempt": i + 1, "first_step": a, "last_step": b, "run_id": run_id}
            for i, (a, b) in enumerate(summary["attempt_steps"])
        ],
    )
    events, _ = folder.read_events()
    plan: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "plan"), {})
    parameters = sum(stage["parameters"] for stage in plan.get("stages", []))
    card = model_card(summary, drive.values, class_names(folder, drive.values), parameters)
    write_atomically(folder.card, card)
    logged = _log_result(drive, run_id, events, names, card)
    times = [event for event in events if event["event"] == "stages"]
    if times:
        drive.say(stages_table(times[-1], names))
    at_once = drive.job.train.schedule == "simultaneous"  # what the plan predicts the rate of
    predicted = plan.get("images_per_second") if at_once else None
    drive.say(result_table(summary, drive.place, drive.uri, predicted=predicted))
    said = pace(events)
    if said:
        drive.say(said)
    write_json(folder.outcome, {**(read_json(folder.outcome) or {}), "recorded": logged})
    return summary


def unrecorded(folder: RunFolder) -> tuple[str, list[str]] | None:
    """The MLflow run and the names of the layers of a finished run that was not concluded; None of any other."""
    if (read_json(folder.outcome) or {}).get("recorded") is not False:
        return None
    events, _ = folder.read_events()
    plan = next((event for event in reversed(events) if event["event"] == "plan"), None)
    return None if plan is None else (read_json(folder.summary)["run_id"], plan["layer_names"])


def _log_result(
    drive: Drive, run_id: str | None, events: list[dict[str, Any]], names: Sequence[str], card: str
) -> bool:
    """Network, plot and files to MLflow, then the status: whether all came there; else there is a warning."""
    folder, uri = drive.folder, drive.uri
    newest, _ = checkpoint.newest_valid(folder)
    assert newest is not None, "a finished run has saved its last step"
    plot = folder.path / "accuracy.svg"
    plot.write_text(accuracy_plot(events, list(names)), encoding="utf-8")
    logged = Logged()
    if drive.part.phases is None:  # the upper layers of a part of a run have learned nothing
        state = checkpoint.read_state(newest)
        description = network.description(drive.values, class_names(folder, drive.values), state)
        name = drive.job.tracking.registered_model
        logged = log_model(uri, run_id or "", newest, description, name, card)
    files = [folder.summary, folder.job, folder.card, plot]
    files += [path for path in (folder.confusion, folder.trace) if path.exists()]
    warning = tracking.finish_run(uri, run_id, "FINISHED", files) or logged.warning
    if warning:
        drive.say(f"warning: {warning}; the same command tries again")
    elif logged.version is not None:
        drive.say(f"Registered as models:/{drive.job.tracking.registered_model}/{logged.version}")
    return warning is None
