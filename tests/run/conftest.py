"""The small transfer job of the tests of cached features."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.job.load import load_job
from orchestrator.job.schema import Job
from orchestrator.run.planning import resolved
from tests.run.feature_jobs import TEXT, Make


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def job(home: Path, shared_database: Path) -> Make:
    """The small transfer job under a name, with overrides; all share one runs folder, so one cache."""

    def make(name: str = "sample", *overrides: str, runs: Path = home / "runs") -> Job:
        path = home / f"{name}.yaml"
        path.write_text(TEXT.format(name=name, runs=runs, database=shared_database))
        return resolved(load_job(path, overrides))

    return make
