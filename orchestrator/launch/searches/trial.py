"""One trial of a search: an ordinary run in a thread, followed by its metric from epoch to epoch. Knows no Ray."""

from __future__ import annotations

import os
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import Interrupted, OrchestratorError
from orchestrator.job.load import job_from_values
from orchestrator.run import checkpoint
from orchestrator.run.folder import RunFolder, read_json

_POLL_S = 0.05
_RETOUCH_S = 0.2


@dataclass(frozen=True)
class TrialTask:
    """What the search decided for one trial; plain values, so that an actor anywhere can run it.

    `fork` is a checkpoint folder that the run goes on from instead of starting afresh; `search_stop` is the file
    whose presence asks all trials to save and leave.
    """

    index: int
    job: dict[str, Any]
    metric: str
    tags: dict[str, str]
    search_stop: str
    origin: str
    fork: str | None = None
    phases: int | None = None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.job["runs"]) / self.job["name"])


def metric_of(event: Mapping[str, Any], metric: str) -> float | None:
    """The metric in a line of events.jsonl; None where it has none. The loss is that of the last trained layer."""
    if metric == "train_loss":
        losses = [x for x in event.get("train_loss", ()) if x is not None]
        return float(losses[-1]) if losses else None
    value = event.get(metric) if event["event"] in ("epoch", "final") else None
    return None if value is None else float(value)


def spent_seconds(folder: RunFolder, fork: str | None) -> float:
    """Seconds in the training loop of this run alone, as far as it has come."""
    before = 0.0 if fork is None else float(checkpoint.read_state(Path(fork))["train_seconds"])
    summary = read_json(folder.summary)
    if summary is not None:
        return float(summary["wall_seconds"]) - before
    saved = [checkpoint.step_folder(folder, step) for step in checkpoint.steps_found(folder)]
    seconds = [float(checkpoint.read_state(path)["train_seconds"]) for path in saved if (path / "state.json").exists()]
    seconds += [float(e["wall_seconds"]) for e in folder.read_events()[0] if e["event"] == "epoch"]
    return max(0.0, max(seconds, default=before) - before)


class TrialRun:
    """A run in a thread of this process. `next_result` waits for its next epoch; `stop` lets it save and leave."""

    def __init__(self, task: TrialTask) -> None:
        self._task, self._folder = task, task.folder
        self._offset = 0
        self._epoch = self._steps = 0
        self._points: list[tuple[int, float, bool]] = []
        self._end: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._thread.start()

    def next_result(self) -> dict[str, Any]:
        """The next epoch's {epoch, metric, last}, or {status, message} with `done` at the end of the run.

        An interrupted run that goes on gives its earlier epochs again, so that nobody else has to remember them.
        """
        while True:
            ended = not self._thread.is_alive()
            self._read()
            if self._points:
                epoch, metric, last = self._points.pop(0)
                return {"epoch": epoch, "metric": metric, "last": last, "done": False}
            if ended:
                end = self._end or {"status": "failed", "message": "the run ended without a result"}
                return {"message": None, **end, "done": True}
            if os.path.exists(self._task.search_stop):
                self.stop()
            else:
                time.sleep(_POLL_S)

    def stop(self) -> None:
        """Ask the run to save at the end of its step, and wait until it has left; its workers end with it."""
        asked: set[Path] = set()
        while self._thread.is_alive():
            attempts = read_json(self._folder.attempts) or []
            if attempts:
                # The file of one attempt says nothing to the next; before the first there is nobody to ask.
                stop_file = self._folder.stop_file(len(attempts))
                if stop_file not in asked:
                    stop_file.touch()
                    asked.add(stop_file)
            self._thread.join(_RETOUCH_S)
        for stop_file in asked:
            stop_file.unlink(missing_ok=True)

    def _read(self) -> None:
        events, self._offset = self._folder.read_events(self._offset)
        for event in events:
            if event["event"] == "start":
                self._steps = int(event["steps_total"])
            if event["event"] == "epoch":
                self._epoch = int(event["epoch"])
            value = metric_of(event, self._task.metric)
            if value is not None:
                self._points.append((self._epoch, value, event["step"] >= self._steps))

    def _run(self) -> None:
        from orchestrator.launch.drive import Part
        from orchestrator.launch.driver import run_job

        warnings.simplefilter("ignore")
        folder = self._folder
        folder.path.mkdir(parents=True, exist_ok=True)
        with open(folder.path / "output.txt", "a", encoding="utf-8", buffering=1) as out:
            try:
                if self._task.fork is not None:
                    checkpoint.fork(Path(self._task.fork), folder)
                run_job(
                    job_from_values(self._task.job),
                    say=lambda text: print(text, file=out),
                    origin=Path(self._task.origin),
                    part=Part(tags=self._task.tags, out=out, phases=self._task.phases),
                )
                self._end = {"status": "finished"}
            except Interrupted:
                self._end = {"status": "interrupted"}
            except OrchestratorError as error:
                print(error, file=out)
                self._end = {"status": "failed", "message": str(error)}
            except Exception as error:  # a trial that breaks must not break the search
                print(traceback.format_exc(), file=out)
                self._end = {"status": "failed", "message": f"{type(error).__name__}: {error}"}


class Board(Protocol):
    """Who decides; every call comes from one thread."""

    def next_task(self) -> TrialTask | None:
        """The next trial to start; None while there is none to be started yet."""

    def is_out(self) -> bool:
        """Whether no trial will be started any more."""

    def on_result(self, index: int, epoch: int, metric: float, last: bool) -> bool:
        """Take an epoch's metric of a trial, `last` with that of its final weights; returns whether it ends here."""

    def on_end(self, index: int, result: dict[str, Any]) -> None:
        """Take the last result of a trial that ended by itself."""

    def on_lost(self, index: int, message: str) -> None:
        """Take note of a trial whose process is gone."""


def run_trials_here(board: Board) -> None:
    """Run the trials of a board in this process, one after the other: what Ray Tune does for many, without Ray."""
    while not board.is_out():
        task = board.next_task()
        if task is None:
            continue
        run = TrialRun(task)
        result = run.next_result()
        while not result["done"]:
            if board.on_result(task.index, result["epoch"], result["metric"], result["last"]):
                run.stop()
                break
            result = run.next_result()
        else:
            board.on_end(task.index, result)
            if result["status"] == "interrupted":
                return
