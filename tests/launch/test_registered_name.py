"""One run, one version in the model registry: what a run is compared with and what a search tries is not registered."""

from __future__ import annotations

from orchestrator.job.load import job_from_values, load_any
from orchestrator.job.search import SearchJob
from orchestrator.launch.controls import control_job, linear_probe
from orchestrator.search.jobs import best_job, trial_job
from orchestrator.search.record import Trial
from tests.conftest import ROOT

NAME = ["tracking.registered_model=mine"]


def test_trials_of_a_search_register_nothing_and_its_best_job_does() -> None:
    search = load_any(ROOT / "jobs" / "search-digits.yaml", NAME)
    assert isinstance(search, SearchJob)
    trial = Trial(0, "t-000", {"train.lr": 0.01})
    assert trial_job(search, [trial], trial, "sqlite:///x.db")["tracking"]["registered_model"] is None
    assert best_job(search, [trial], trial)["tracking"]["registered_model"] == "mine"


def test_controls_register_nothing() -> None:
    values = {
        "kind": "transfer",
        "name": "t",
        "data": {"train": "nowhere", "image_size": 64},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "objective": {"name": "hff"},
        "train": {"epochs": 1, "global_batch_size": 8, "lr": 1e-3},
        "tracking": {"registered_model": "mine"},
    }
    control = control_job(job_from_values(values), "linear-probe", linear_probe)
    assert control.name == "t-control-linear-probe"
    assert control.tracking.registered_model is None
