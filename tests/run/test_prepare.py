"""What is done with a run of this name: which checkpoint, which attempt, or a refusal."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import CheckpointError, JobError
from orchestrator.run import checkpoint, prepare
from orchestrator.run.folder import RunFolder, write_json


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "a")


def save(folder: RunFolder, at: int) -> Path:
    """A checkpoint of no layers."""
    return checkpoint.commit(folder, at, 1, {"step": at}, [])


def test_resume_must_without_a_checkpoint_is_an_error(folder: RunFolder) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        prepare.next_attempt(folder, "must")


def test_another_job_under_the_same_name_is_refused_with_the_difference(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    folder.job.write_text(
        "name: a\ndata: {train: x}\nmodel: {}\ntrain: {lr: 0.1}\nobjective: {name: ff}\ncluster: {workers: 1}\n"
    )
    others = {"model": {}, "objective": {"name": "ff"}, "cluster": {"workers": 8}}
    same = {"name": "a", "data": {"train": "y"}, "train": {"lr": 0.1}, **others}
    prepare.refuse_changes(folder, same)
    with pytest.raises(JobError, match=r"train.lr: was 0.1, is 0.2") as caught:
        prepare.refuse_changes(folder, {**same, "train": {"lr": 0.2}})
    assert caught.value.exit_code == 2


def tries(*entries: tuple[int, int | None]) -> list[dict[str, Any]]:
    """First and last step of each attempt, None for one that did not live to say it."""
    return [{"attempt": i, "first_step": a, "last_step": b, "run_id": "x"} for i, (a, b) in enumerate(entries, start=1)]


@pytest.mark.parametrize(
    ("progress", "came_to"),
    [({"attempt": 2, "step": 17}, 17), ({"attempt": 1, "step": 99}, 10), ({"attempt": 2, "step": 3}, 10), (None, 10)],
    ids=["its own", "of the one before", "of its start", "none"],
)
def test_an_attempt_that_was_killed_came_as_far_as_its_own_progress_says(
    folder: RunFolder, progress: dict[str, int] | None, came_to: int
) -> None:
    newest = save(folder, 10)
    write_json(folder.attempts, tries((0, 12), (10, None)))
    if progress is not None:
        write_json(folder.progress, progress)
    attempt = prepare.next_attempt(folder, "auto")
    assert (attempt.number, attempt.resume_from, attempt.run_id) == (3, newest, "x")
    assert attempt.earlier_steps == [[0, 12], [10, came_to]]
    prepare.record_attempt(folder, attempt, 10, "x")
    assert prepare.next_attempt(folder, "must").earlier_steps == [[0, 12], [10, came_to], [10, 10]]


def test_a_run_without_a_past_is_attempt_one_of_no_mlflow_run(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    attempt = prepare.next_attempt(folder, "auto")
    assert (attempt.number, attempt.resume_from, attempt.run_id, attempt.earlier_steps) == (1, None, None, [])


def test_only_a_finished_summary_of_the_same_job_ends_a_run(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    job = {"name": "a", "data": {"train": "x"}, "model": {}, "train": {"lr": 0.1}, "objective": {"name": "ff"}}
    assert prepare.finished_summary(folder, job) is None
    folder.job.write_text("name: a\ndata: {train: x}\nmodel: {}\ntrain: {lr: 0.1}\nobjective: {name: ff}\n")
    write_json(folder.summary, {"status": "stopped"})
    assert prepare.finished_summary(folder, job) is None
    write_json(folder.summary, {"status": "finished"})
    assert prepare.finished_summary(folder, job) == {"status": "finished"}
    with pytest.raises(JobError, match=r"train.lr: was 0.1, is 0.2"):
        prepare.finished_summary(folder, {**job, "train": {"lr": 0.2}})


def test_weights_to_begin_with_are_the_newest_whole_ones_or_those_of_the_step_that_is_named(folder: RunFolder) -> None:
    runs = folder.path.parent
    first, second = save(folder, 5), save(folder, 10)
    assert prepare.weights_source(runs, "a") == second
    assert prepare.weights_source(runs, "a@5") == first
    (second / "state.json").write_text("{}")
    assert prepare.weights_source(runs, "a") == first
    with pytest.raises(CheckpointError, match=r"train.init_from: .*step_000000010: state.json has 2 bytes"):
        prepare.weights_source(runs, "a@10")
    with pytest.raises(CheckpointError, match=r"step_000000007: manifest.json is missing"):
        prepare.weights_source(runs, "a@7")
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(CheckpointError, match=r"train.init_from: .*/a has no checkpoint"):
        prepare.weights_source(runs, "a")
