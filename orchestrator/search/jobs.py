"""From the values of a trial to its job: the base with these values, in the search's own folder. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.job import space
from orchestrator.job.search import SearchJob
from orchestrator.search import layerwise
from orchestrator.search.record import Trial, trial_name


def new_trial(search: SearchJob, trials: Sequence[Trial], index: int) -> Trial:
    """Trial `index`: its values follow from the space, the seed and, with sampler tpe, the results so far."""
    layer = parent = None
    peers = list(trials)
    if search.strategy == "layerwise":
        layer = layerwise.layer_of(index, search.trials_each)
        settled = layerwise.winner(trials, layer - 1, search.sign)
        parent = None if settled is None else settled.index
        peers = [t for t in trials if t.layer == layer]
    if search.sampler == "grid":
        values = space.grid_values(search.domains, index % search.trials_each)
    elif search.sampler == "tpe":
        from orchestrator.search import tpe

        values = tpe.suggest(search.domains, peers, seed=search.seed, index=index, mode=search.mode)
    else:
        values = space.random_values(search.domains, search.seed, index)
    return Trial(index, trial_name(search.name, index), values, layer=layer, parent=parent)


def trials_folder(search: SearchJob) -> Path:
    """Where the runs of the trials lie."""
    return Path(search.runs) / search.name / "trials"


def trial_job(search: SearchJob, trials: Sequence[Trial], trial: Trial, tracking_uri: str) -> dict[str, Any]:
    """The plain values of the job of a trial; all trials share the search's tracking, none is registered as a model."""
    job = _with_trial(search, trials, trial)
    job |= {"name": trial.name, "runs": str(trials_folder(search))}
    job["tracking"] = {**search.tracking.model_dump(mode="json"), "uri": tracking_uri, "registered_model": None}
    if job["train"]["init_from"] is not None:
        # Named beside the search, seen from the folder of its trials.
        job["train"]["init_from"] = f"../../{job['train']['init_from']}"
    return job


def best_job(search: SearchJob, trials: Sequence[Trial], trial: Trial) -> dict[str, Any]:
    """The plain values of the job that does a trial again as a run of its own."""
    job = _with_trial(search, trials, trial)
    job |= {"name": f"{search.name}-best", "runs": search.runs}
    job["tracking"] = search.tracking.model_dump(mode="json")
    return job


def _with_trial(search: SearchJob, trials: Sequence[Trial], trial: Trial) -> dict[str, Any]:
    if trial.layer is None:
        return space.with_values(search.base, trial.values)
    return space.with_values(search.base, {"per_layer": layerwise.per_layer(trials, trial)})
