"""A small transfer job whose backbone's features are cached, and what its tests do with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orchestrator.job.resolved import job_to_dict
from orchestrator.job.schema import Job
from orchestrator.launch.driver import run_job
from orchestrator.launch.features import features_of
from orchestrator.run.context import LocalContext
from orchestrator.run.datasets import Datasets, open_datasets, prepare_embedded
from orchestrator.run.features import Wanted, build_trunk, examine, wanted_sets

TEXT = """\
kind: transfer
name: {name}
runs: {runs}
data: {{train: digits, val: {{from_train: 0.25}}, image_size: 32}}
model: {{backbone: test_resnet.r160_in1k, pretrained: false, heads_at: [0, 2], top_widths: [16], vote: equal}}
objective: {{name: hff}}
train: {{epochs: 2, global_batch_size: 100, optimizer: adamw, lr: 5.0e-3}}
features: {{dtype: float32}}
cluster: {{launcher: process, workers: 1, timeout_s: 60, max_failures: 0}}
tracking: {{uri: "sqlite:///{database}"}}
"""

Make = Callable[..., Job]


def quietly(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """MLflow and its database layer warn of their own affairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def train(job: Job, **options: Any) -> dict[str, Any]:
    summary: dict[str, Any] = quietly(run_job, job, say=lambda _: None, **options)
    return summary


def opened(job: Job) -> Datasets:
    values = job_to_dict(job)
    prepare_embedded(values["data"], Path(job.runs))
    return open_datasets(values)


def prepared(job: Job, event: Callable[[dict[str, Any]], None] = lambda _: None) -> list[Wanted]:
    """Make the features of a job; gives its sets."""
    datasets = opened(job)
    features_of(job, datasets, None, say=lambda _: None, event=event)
    values = job_to_dict(job)
    return wanted_sets(values, datasets, examine(values, len(datasets.classes), None))[0]


class Leaving(LocalContext):
    """A worker that is asked to leave after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def stop_requested(self) -> bool:
        self.steps -= 1
        return self.steps < 0


def layers_of_trunk(values: dict[str, Any]) -> list[Any]:
    return build_trunk(values, 10, torch.device("cpu"))
