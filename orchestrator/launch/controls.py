"""Controls of a transfer job: what else could be done with the same backbone, on the same data, in one command."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.stores.run_store import RunStore
from orchestrator.errors import JobError
from orchestrator.job import paths
from orchestrator.job.load import job_from_values
from orchestrator.job.resolved import job_to_dict
from orchestrator.job.schema import Job, TransferJob
from orchestrator.launch.features import features_of
from orchestrator.run.datasets import open_datasets
from orchestrator.run.folder import RunFolder, write_json
from orchestrator.run.inference.neighbours import neighbours_top1
from orchestrator.run.planning import resolved
from orchestrator.run.records import tracking
from orchestrator.show.terminal import controls_table

Values = dict[str, Any]
RunJob = Callable[[Job], Values]
# From the job and the way to run one to a result: {"val_top1", "test_top1", "seconds", ...}.
Control = Callable[[Job, RunJob], Values]
_SHOWN = ("val_top1", "test_top1", "vote_weights", "images_per_second")


def linear_probe(values: Values) -> Values:
    """A linear classifier on the frozen last stage: what transfer learning is usually measured by."""
    objective = {"name": "ce", "label_smoothing": _smoothing(values)}
    return _frozen(values, heads_at="last", vote="last") | {"objective": objective}


def prototype_last(values: Values) -> Values:
    """HFF prototypes in place of the linear classifier, at the last stage alone."""
    return _frozen(values, heads_at="last", vote="last") | {"objective": _hff(values)}


def heads_vote(values: Values) -> Values:
    """HFF heads on every stage of the frozen trunk, with fitted votes."""
    return _frozen(values, heads_at="all", vote="fitted") | {"objective": _hff(values)}


def last_stage(values: Values) -> Values:
    """The frozen last stage alone, of images without augmentation: what nearest neighbours compare."""
    data = values["data"] | {"augment": {}}
    features = values["features"] | {"cache": True, "views": 1}
    return _frozen(values, heads_at="last", vote="last") | {"data": data, "features": features}


def full_backpropagation(values: Values) -> Values:
    """Everything fine-tuned end to end."""
    objective = {"name": "bp", "label_smoothing": _smoothing(values)}
    model = values["model"] | {"freeze": "none", "heads_at": "last", "vote": "last", "top_widths": []}
    return values | {"model": model, "objective": objective, "train": _simultaneous(values), "per_layer": []}


def _frozen(values: Values, *, heads_at: str, vote: str) -> Values:
    model = values["model"] | {"freeze": "all", "heads_at": heads_at, "vote": vote, "top_widths": []}
    return values | {"model": model, "train": _simultaneous(values), "per_layer": []}


def _smoothing(values: Values) -> float:
    """That of the job; an own objective, whose options mean what they like, has none."""
    objective = values["objective"]
    return 0.0 if objective["name"] == "own" else float(objective["label_smoothing"])


def _hff(values: Values) -> Values:
    objective: Values = values["objective"]
    return objective if objective["name"] == "hff" else {"name": "hff"}


def _simultaneous(values: Values) -> Values:
    train: Values = values["train"] | {"schedule": "simultaneous"}
    return train


def control_job(job: Job, name: str, change: Callable[[Values], Values]) -> Job:
    """The job of a control: the changed one, under a name of its own, not registered as a model. Raises JobError."""
    values = change(job_to_dict(job)) | {"name": f"{job.name}-control-{name}", "controls": []}
    values["tracking"] = {**values["tracking"], "registered_model": None}
    return job_from_values(values, place=f"controls: {name}")


def _by_job(name: str, change: Callable[[Values], Values]) -> Control:
    """A control that is an ordinary run."""

    def control(job: Job, run: RunJob) -> Values:
        summary = run(control_job(job, name, change))
        kept = {key: summary[key] for key in _SHOWN if key in summary}
        return {**kept, "run": summary["name"], "seconds": summary["wall_seconds"]}

    return control


def _nearest_neighbours(job: Job, run: RunJob) -> Values:
    """The control without training; its features are kept for the other controls with a head there."""
    began = time.monotonic()
    plain = resolved(control_job(job, "knn", last_stage))
    plain = plain.model_copy(update={"runs": paths.runs_here(job.runs)})
    values = job_to_dict(plain)
    datasets = open_datasets(values)
    folders = features_of(plain, datasets, None, say=print, event=lambda _: None)
    assert folders is not None, "a frozen trunk has features"
    device = torch.device("cuda" if plain.cluster.use_gpu and torch.cuda.is_available() else "cpu")
    accuracy = neighbours_top1(values, datasets, folders, device)
    return {**accuracy, "seconds": time.monotonic() - began}


_JOBS: dict[str, Callable[[Values], Values]] = {
    "linear-probe": linear_probe,
    "prototype-last": prototype_last,
    "heads-vote": heads_vote,
    "bp": full_backpropagation,
}
_CHANGES = {**_JOBS, "knn": last_stage}
CONTROLS: dict[str, Control] = {
    **{name: _by_job(name, change) for name, change in _JOBS.items()},
    "knn": _nearest_neighbours,
}


def wanted_controls(job: Job) -> tuple[str, ...]:
    """The controls that a job asks for. Raises JobError for one that cannot be made."""
    wanted = job.controls if isinstance(job, TransferJob) else ()
    for name in wanted:
        if name not in CONTROLS:
            raise JobError(f"controls: must be some of {', '.join(CONTROLS)}, got {name!r}")
        control_job(job, name, _CHANGES[name])
    return wanted


def run_controls(job: Job, summary: Values, run: RunJob, say: Callable[[str], None]) -> Values:
    """Run the controls of a job whose own run is finished; returns its summary with `controls` in it.

    A control that was finished earlier is not run again. The run folder's and MLflow's summary get the results too.
    """
    wanted = wanted_controls(job)
    if not wanted:
        return summary
    results = {name: CONTROLS[name](job, run) for name in wanted}
    summary = summary | {"controls": results}
    runs = Path(paths.runs_here(job.runs))
    folder = RunFolder(runs / job.name)
    write_json(folder.summary, summary)
    if paths.is_store(job.runs):
        RunStore(job.runs).put(f"{job.name}/{folder.summary.name}", folder.summary)
    uri = tracking.resolve_uri(job.tracking.uri, runs)
    warning = tracking.finish_run(uri, summary["run_id"], "FINISHED", [folder.summary])
    if warning:
        say(f"warning: {warning}")
    say(controls_table(summary))
    return summary
