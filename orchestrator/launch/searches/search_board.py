"""What a search decides from trial to trial, and its durable record: RUNS/NAME/search.json."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import JobError
from orchestrator.job.load import job_from_values
from orchestrator.job.search import SearchJob
from orchestrator.launch.searches.trial import TrialTask, spent_seconds
from orchestrator.run import checkpoint
from orchestrator.run.folder import RunFolder, read_json, write_json
from orchestrator.search import early, jobs, layerwise, record
from orchestrator.search.record import Trial
from orchestrator.show.search_terminal import end_line, start_line

Say = Callable[[str], None]


class Record:
    """The trials of a search by index, on disk after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        saved = read_json(path) or {"run_id": None, "seconds": 0.0, "trials": []}
        self.run_id: str | None = saved["run_id"]
        self.trials: list[Trial] = record.from_json(saved["trials"])
        self._before, self._began = float(saved["seconds"]), time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the search, of earlier sessions too."""
        return self._before + time.monotonic() - self._began

    def put(self, trial: Trial) -> Trial:
        """Add a trial, or replace what is known of it."""
        self.trials[trial.index : trial.index + 1] = [trial]
        self.save()
        return trial

    def save(self) -> None:
        write_json(
            self._path,
            {"run_id": self.run_id, "seconds": self.seconds, "trials": record.to_json(self.trials)},
        )


class SearchBoard:
    """The board that ray_tune asks. Trials of an earlier session that did not end go first, then new ones."""

    def __init__(
        self,
        search: SearchJob,
        kept: Record,
        *,
        layers: int | None,
        uri: str,
        folder: RunFolder,
        origin: Path,
        say: Say,
    ) -> None:
        self.search, self.record = search, kept
        self.layers, self.uri, self.folder, self.origin, self.say = layers, uri, folder, origin, say
        self._waiting = [t.index for t in kept.trials if not t.ended]
        self.total = search.trials_each * (1 if layers is None else layers)

    @property
    def stop_file(self) -> Path:
        """Its presence asks every trial to save and leave."""
        return self.folder.path / "stop"

    @property
    def left(self) -> int:
        """Trials that have not ended."""
        return self.total - sum(t.ended for t in self.record.trials)

    # --- what ray_tune asks

    def is_out(self) -> bool:
        """Whether no trial will be started any more."""
        if self.stop_file.exists() or (len(self.record.trials) >= self.total and not self._waiting):
            return True
        return self.layers is not None and layerwise.failed_layer(self.trials, self.search.trials_each) is not None

    def next_task(self) -> TrialTask | None:
        """The next trial to start; None while the layer before it is not settled."""
        if self._waiting:
            return self._task(self.trials[self._waiting.pop(0)], again=True)
        index: int | None = len(self.trials)
        if self.layers is not None:
            index = layerwise.next_index(self.trials, self.search.trials_each, self.layers, self.search.sign)
        if index is None or index >= self.total:
            return None
        trial = self.record.put(jobs.new_trial(self.search, self.trials, index))
        try:
            return self._task(trial)
        except JobError as error:
            self._ended(replace(trial, status="failed", message=str(error)))
            return None

    def on_result(self, index: int, epoch: int, metric: float, last: bool) -> bool:
        """Take an epoch's metric of a trial; returns whether the trial ends here."""
        trial = self.trials[index]
        epoch -= self._epochs_before(trial)
        if trial.curve and epoch <= trial.curve[-1][0]:
            return False  # done again after an interruption: decided before
        trial = self.record.put(trial.with_result(epoch, metric))
        if last or not self._stops(trial):
            return False
        folder = self._run_folder(trial)
        folder.stop_file(len(read_json(folder.attempts) or [])).touch()
        self._ended(replace(trial, status="stopped", metric=metric))
        return True

    def on_end(self, index: int, result: dict[str, Any]) -> None:
        """Take the last result of a trial; an interrupted one stays as it is."""
        trial = self.trials[index]
        if result["status"] == "finished":
            self._ended(replace(trial, status="finished", metric=trial.curve[-1][1]))
        elif result["status"] == "failed":
            metric = trial.curve[-1][1] if trial.curve else None
            self._ended(replace(trial, status="failed", metric=metric, message=result["message"]))

    def on_lost(self, index: int, message: str) -> None:
        """Take note of a trial whose process is gone; it goes on when the search is run again."""
        if self.trials[index].ended:
            return  # it had nothing more to say
        trial = self.record.put(replace(self.trials[index], message=message))
        self.say(f"warning: trial {trial.index} was lost: {message}")

    # --- decisions and their inputs

    @property
    def trials(self) -> list[Trial]:
        return self.record.trials

    def _stops(self, trial: Trial) -> bool:
        scheduler, sign = self.search.scheduler, self.search.sign
        others = [t.curve for t in self.trials if t.index != trial.index and t.layer == trial.layer and t.curve]
        if scheduler.name == "asha":
            grace, factor = scheduler.grace_epochs, scheduler.reduction_factor
            return early.asha_stops(trial.curve, others, grace_epochs=grace, factor=factor, sign=sign)
        if scheduler.name == "median":
            return early.median_stops(trial.curve, others, grace_epochs=scheduler.grace_epochs, sign=sign)
        return False

    def _epochs_before(self, trial: Trial) -> int:
        """Epochs of the settled layers, which are no part of a layer's own curve."""
        return 0 if trial.layer is None else trial.layer * int(self.search.base["train"]["epochs"])

    def _task(self, trial: Trial, again: bool = False) -> TrialTask:
        values = jobs.trial_job(self.search, self.trials, trial, self.uri)
        job_from_values(values, place=f"trial {trial.index}")
        self.say(start_line(trial, self.total, again=again))
        return TrialTask(
            index=trial.index,
            job=values,
            metric=self.search.metric,
            tags={
                "mlflow.parentRunId": self.record.run_id or "",
                "search.name": self.search.name,
                "search.trial": str(trial.index),
            },
            search_stop=str(self.stop_file),
            origin=str(self.origin),
            fork=self._fork(trial),
            phases=None if trial.layer is None else trial.layer + 1,
        )

    def _fork(self, trial: Trial) -> str | None:
        """The checkpoint that a candidate goes on from: the last one of the winner below."""
        if trial.parent is None:
            return None
        folder = self._run_folder(self.trials[trial.parent])
        return str(checkpoint.step_folder(folder, checkpoint.steps_found(folder)[-1]))

    def _run_folder(self, trial: Trial) -> RunFolder:
        return RunFolder(jobs.trials_folder(self.search) / trial.name)

    def summary_of(self, trial: Trial) -> dict[str, Any] | None:
        """What the finished run of a trial achieved; None without one."""
        summary: dict[str, Any] | None = read_json(self._run_folder(trial).summary)
        return summary

    def _ended(self, trial: Trial) -> None:
        trial = self.record.put(self.measured(trial))
        self.say(end_line(trial, self.total, self.search.metric))

    def measured(self, trial: Trial) -> Trial:
        """The trial with what its run folder says: training seconds and MLflow run."""
        folder = self._run_folder(trial)
        attempts = read_json(folder.attempts) or []
        run_id = attempts[-1]["run_id"] if attempts else None
        return replace(trial, seconds=spent_seconds(folder, self._fork(trial)), run_id=run_id)
