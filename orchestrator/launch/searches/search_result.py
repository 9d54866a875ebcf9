"""The end of a search: best job, summary, page and MLflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.job.load import job_from_values
from orchestrator.job.resolved import job_yaml
from orchestrator.job.search import SearchJob
from orchestrator.launch.searches.search_board import SearchBoard
from orchestrator.run import prepare
from orchestrator.run.folder import write_atomically, write_json
from orchestrator.run.records import tracking
from orchestrator.search import jobs, layerwise, record
from orchestrator.search.record import Trial
from orchestrator.show.pages.report import write_report
from orchestrator.show.search_terminal import search_table, values_text


def conclude(board: SearchBoard) -> dict[str, Any]:
    """Best job, summary, page, MLflow. Raises OrchestratorError when trials are missing or none has finished."""
    search, kept, folder = board.search, board.record, board.folder
    for trial in list(kept.trials):
        kept.put(_settled(board, trial))
    lost = [t for t in kept.trials if not t.ended]
    candidates = kept.trials
    if search.strategy == "layerwise":
        candidates = [t for t in kept.trials if t.layer == (board.layers or 1) - 1]
    best = record.best(candidates, search.sign)
    if lost or best is None:
        tracking.finish_run(board.uri, kept.run_id, "FAILED", [])
        raise OrchestratorError(_nothing_found(search, kept.trials, lost))
    best_file = folder.path / "best.yaml"
    write_atomically(best_file, job_yaml(job_from_values(jobs.best_job(search, kept.trials, best))))
    best_file.chmod(0o755)
    summary = _summary(board, best)
    write_json(folder.summary, summary)
    page = folder.path / "report.html"
    write_report([folder.path], page)
    warning = _log_result(board, summary, [folder.summary, folder.job, best_file, page])
    if warning:
        board.say(f"warning: {warning}")
    board.say(search_table(summary, folder.path, board.uri))
    return summary


def _settled(board: SearchBoard, trial: Trial) -> Trial:
    """The trial as its folder has it in the end: one that was done before the word to stop reached it has finished."""
    trial = board.measured(trial)
    summary = board.summary_of(trial)
    if trial.status == "stopped" and summary is not None and trial.curve:
        value = summary.get(board.search.metric, trial.metric)
        return replace(trial, status="finished", metric=value)
    return trial


def _nothing_found(search: SearchJob, trials: list[Trial], lost: list[Trial]) -> str:
    if lost:
        names = ", ".join(str(t.index) for t in lost)
        return (
            f"{search.name}: trials {names} did not end: {lost[0].message or 'interrupted'}\n"
            "Run the same command again: they go on from their checkpoints, finished trials are kept."
        )
    layer = layerwise.failed_layer(trials, search.trials_each) if search.strategy == "layerwise" else None
    of = "" if layer is None else f" for layer {layer}"
    failed = next((t for t in trials if t.status == "failed" and t.layer == layer), None)
    why = "" if failed is None else f"; trial {failed.index}: {failed.message}"
    return f"{search.name}: no trial{of} has finished{why}"


def _summary(board: SearchBoard, best: Trial) -> dict[str, Any]:
    search, kept = board.search, board.record
    chain = layerwise.chain(kept.trials, best)
    run = board.summary_of(best) or {}
    # What is not said of the search itself is said of its best run.
    return run | {
        "name": search.name,
        "kind": search.kind,
        "status": "finished",
        "run_id": kept.run_id,
        "metric": search.metric,
        "mode": search.mode,
        "strategy": search.strategy,
        "sampler": search.sampler,
        "scheduler": search.scheduler.name,
        "seed": search.seed,
        "best": {
            "index": best.index,
            "name": best.name,
            "metric": best.metric,
            "values": best.values if best.layer is None else [t.values for t in chain],
            "words": [values_text(t.values) for t in chain],
            "weights_sha256": run.get("weights_sha256"),
        },
        "counts": record.counts(kept.trials),
        "trials": record.to_json(kept.trials),
        "train_seconds": record.total_seconds(kept.trials),
        "wall_seconds": kept.seconds,
        "git_commit": prepare.git_commit(board.origin),
    }


def _log_result(board: SearchBoard, summary: dict[str, Any], files: list[Path]) -> str | None:
    """The best and the counts to the parent run, how each trial ended to its own. Returns a warning."""
    kept = board.record
    for trial in kept.trials:
        if trial.run_id is not None:
            status = "FAILED" if trial.status == "failed" else None
            tags = {"search.status": trial.status, "search.metric": str(trial.metric)}
            tracking.note(board.uri, trial.run_id, tags=tags, status=status)
    metrics = {f"best/{summary['metric']}": summary["best"]["metric"], "search/train_seconds": summary["train_seconds"]}
    metrics |= {f"search/{status}": float(count) for status, count in summary["counts"].items()}
    tags = {"search.best_trial": summary["best"]["name"], "search.best_values": "; ".join(summary["best"]["words"])}
    warning = tracking.note(board.uri, kept.run_id or "", tags=tags, metrics=metrics)
    return tracking.finish_run(board.uri, kept.run_id, "FINISHED", files) or warning
