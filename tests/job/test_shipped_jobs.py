"""The job files in jobs/: executable, explained, valid offline, controls in step with what they control."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from orchestrator.job.load import (
    INTERPRETER_LINE,
    Job,
    SearchJob,
    differences,
    job_from_values,
    job_to_dict,
    load_any,
    load_job,
)
from orchestrator.job.network import known_classes, known_train_samples, layer_shapes, own_model

JOBS = Path(__file__).parents[2] / "jobs"
FILES = sorted(JOBS.glob("*.yaml"))
EXPECTED = {
    "cifar10",
    "cifar10-bp",
    "cifar10-cpu",
    "cifar10-cpu-bp",
    "imagenet",
    "imagenet-bp",
    "mnist",
    "quickstart",
    "search-cifar10",
    "search-digits",
    "search-layerwise",
    "tiny-imagenet20",
    "tiny-imagenet20-bp",
}

# A beginning for data that nobody knows yet.
UNKNOWN = {"own-images"}
every_job = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


def header(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[1 : next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def run_of(path: Path) -> Job:
    """The job of one run: of a search, the one that its trials vary."""
    job = load_any(path)
    return job_from_values(job.base) if isinstance(job, SearchJob) else job


def test_all_published_jobs_are_there() -> None:
    assert {path.stem for path in FILES} >= EXPECTED


@every_job
def test_a_job_file_is_executable_and_names_its_interpreter(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert path.read_bytes().split(b"\n", 1)[0] == b"#!/usr/bin/env -S python -m orchestrator run"
    assert INTERPRETER_LINE == "#!/usr/bin/env -S python -m orchestrator run"


@every_job
def test_a_job_file_opens_with_what_it_does_what_to_expect_and_the_command(path: Path) -> None:
    lines = header(path)
    assert len(" ".join(lines)) > 200
    assert sum(line.startswith("# Expect: ") for line in lines) == 1
    assert any(line.split("  ")[1:2] == [f" orchestrator run jobs/{path.name}"] for line in lines)


@every_job
def test_a_job_is_valid_under_the_name_of_its_file(path: Path) -> None:
    job = load_any(path)
    assert job.name == path.stem
    assert job.runs == str(JOBS.parent / "runs")


@every_job
def test_a_job_that_needs_data_says_how_to_make_each_shard_folder(path: Path) -> None:
    job = run_of(path)
    text = "\n".join(header(path))
    for place in (job.data.train, job.data.val, job.data.test):
        if isinstance(place, str) and place != "digits":
            relative = os.path.relpath(place, JOBS.parent)
            assert relative.startswith("data/")
            packs = [line.split() for line in text.splitlines() if "orchestrator data pack" in line]
            assert any(words[5] == relative for words in packs), relative


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in UNKNOWN], ids=lambda path: path.stem)
def test_a_job_can_be_checked_and_described_without_its_data(path: Path) -> None:
    job = run_of(path)
    classes, samples = known_classes(job), known_train_samples(job)
    assert classes is not None
    assert samples is not None
    if own_model(job) is not None:
        assert len(layer_shapes(job, classes)) >= (job.cluster.stages if isinstance(job.cluster.stages, int) else 1)


@pytest.mark.parametrize("name", ["cifar10", "cifar10-cpu", "imagenet", "tiny-imagenet20"])
def test_a_control_differs_from_its_job_in_the_objective_and_a_learning_rate_of_its_own(name: str) -> None:
    local, control = load_job(JOBS / f"{name}.yaml"), load_job(JOBS / f"{name}-bp.yaml")
    assert control.objective.name == "bp"
    changed = differences(job_to_dict(local), job_to_dict(control))
    assert changed
    assert all(line.startswith(("objective.", "train.lr: ")) for line in changed)
    places = [(job.data.train, job.data.val, job.data.test) for job in (local, control)]
    assert places[0] == places[1]


def test_the_quickstart_is_two_stages_on_two_workers() -> None:
    job = load_job(JOBS / "quickstart.yaml")
    assert (job.data.train, job.train.precision) == ("digits", "float32")
    assert job.train.epochs is not None
    assert (job.cluster.workers, job.cluster.stages, job.cluster.threads_per_worker) == (2, 2, 1)


def test_the_imagenet_job_states_the_size_of_imagenet() -> None:
    expect = load_job(JOBS / "imagenet.yaml").data.expect
    assert expect is not None
    assert (expect.train_samples, expect.val_samples, expect.classes) == (1_281_167, 50_000, 1000)
