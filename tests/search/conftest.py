"""A small search file and a way to run it in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.job.load import load_any
from orchestrator.job.search import SearchJob
from orchestrator.launch.searches.search import run_search
from orchestrator.launch.searches.trial import run_trials_here

SEARCH = """\
#!/usr/bin/env -S python -m orchestrator run
kind: search
name: small
runs: {runs}
base:
  data: digits
  model: {{arch: mlp, widths: [16, 16]}}
  objective: {{name: hff}}
  train: {{epochs: 3, global_batch_size: 200, lr: 5.0e-3{train}}}
  cluster: {{launcher: process, max_failures: 0}}
space:
  train.lr: {{loguniform: [1e-4, 1e-2]}}
  objective.prototypes_per_class: {{randint: [1, 3]}}
samples: 3
tracking: {{uri: "sqlite:///{database}", experiment: {experiment}}}
"""

Search = Callable[..., dict[str, Any]]


def write_search(folder: Path, database: Path, *, train: str = "", experiment: str = "search") -> Path:
    path = folder / "small.yaml"
    path.write_text(
        SEARCH.format(runs=folder / "runs", database=database, train=train, experiment=f"{experiment}-{folder.name}")
    )
    return path


def run(path: Path, *overrides: str, runner: Any = run_trials_here, **more: Any) -> tuple[dict[str, Any], list[str]]:
    """The summary of a search and what it said."""
    job = load_any(path, overrides)
    assert isinstance(job, SearchJob)
    said: list[str] = []
    return run_search(job, say=said.append, runner=runner, **more), said


@pytest.fixture
def search_file(tmp_path: Path, shared_database: Path) -> Callable[..., Path]:
    def write(**options: str) -> Path:
        return write_search(tmp_path, shared_database, **options)

    return write
