"""Trials as actors under Ray Tune: placement and the round of results. What to try and what to stop is decided
elsewhere, by a `Board`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.launch.searches.trial import Board, TrialRun
from orchestrator.launch.signals import beside_main_thread
from orchestrator.search.fit import Need

# Tune's own files, tables and signals: the search has its record, its terminal and its handler.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class _TrialActor(tune.Trainable):  # type: ignore[misc]
    """The driver of one trial after the other. A `step` is an epoch; an early end comes with the next trial or with
    `cleanup`, whichever is first."""

    def setup(self, config: dict[str, Any]) -> None:
        self._run = TrialRun(config["task"])

    def step(self) -> dict[str, Any]:
        return self._run.next_result()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self._run.stop()


class _Trials(Searcher):  # type: ignore[misc]
    """Hands out the board's trials."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def suggest(self, trial_id: str) -> Any:
        if self._board.is_out():
            return Searcher.FINISHED
        task = self._board.next_task()
        return None if task is None else {"task": task}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        return None

    def save(self, checkpoint_path: str) -> None:
        # The record of the search is its only memory.
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        return None


class _Decisions(FIFOScheduler):  # type: ignore[misc]
    """Passes results to the board and its decisions back."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stops = self._board.on_result(_index(trial), result["epoch"], result["metric"], result["last"])
        return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if "status" in result:
            self._board.on_end(_index(trial), result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        error = trial.get_pickled_error() or trial.get_error()
        self._board.on_lost(_index(trial), str(error).strip().splitlines()[-1] if error else "its process is gone")


def _index(trial: Any) -> int:
    return int(trial.config["task"].index)


def _name(trial: Any) -> str:
    return str(trial.config["task"].job["name"])


def run_trials(board: Board, *, need: Need, at_once: int, total: int, storage: Path) -> None:
    """Run up to `total` trials of the board, `at_once` at a time, and wait for the end of all.

    Ray must be running. What Tune itself raises is passed on.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    tuner = tune.Tuner(
        tune.with_resources(_TrialActor, _bundles(need)),
        tune_config=tune.TuneConfig(
            search_alg=_Trials(board),
            scheduler=_Decisions(board),
            num_samples=total,
            max_concurrent_trials=at_once,
            # A process that has imported everything is worth keeping.
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=storage.name,
            storage_path=str(storage.parent),
            verbose=0,
            # Runs save for themselves.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    beside_main_thread(tuner.fit, "ray-tune")


def _bundles(need: Need) -> Any:
    """What the actor itself holds. Under Ray Train its workers come in a group of their own."""
    if need.driver_cpus:
        return tune.PlacementGroupFactory([{"CPU": need.driver_cpus}])
    resources = {"CPU": need.cpus, **({"GPU": need.gpus} if need.gpus else {})}
    return tune.PlacementGroupFactory([resources])
