"""Bad job files and overrides: the exact message, all of them at once, exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EXIT_JOB, JobError
from orchestrator.job.load import load_job


def said(path: str | Path, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    assert caught.value.exit_code == EXIT_JOB
    return str(caught.value)


def test_the_job_that_all_rows_change_is_good(tmp_path: Path, good_text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(good_text)
    assert load_job(path).name == "sample"


def test_a_bad_job_gets_exactly_its_message(bad_job: Any) -> None:
    assert said(bad_job.path, *bad_job.overrides) == bad_job.message


def test_all_problems_of_a_file_come_together_sorted_by_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "kind: train\n"
        "name: a b\n"
        "data: {train: data/x, image_size: 0, mean: [1, .nan, 1]}\n"
        "model: {arch: mlp, widths: [8, 8]}\n"
        "objective: {name: ce, sharpness: 1}\n"
        "train:\n"
        "  epochs: 4\n"
        "  steps: 5\n"
        "  global_batch_size: *b\n"
        "  lr: -1\n"
        "  lr: 2\n"
        "  optimiser: sgd\n"
        "cluster: {workers: 3, stages: 3}\n"
    )
    assert said(path, "train.seed=x", "nonsense").splitlines() == [
        f"{path}:2: name: must be 1 to 100 letters, digits, dots, dashes and underscores, "
        "the first a letter or a digit, got 'a b'",
        f"{path}:3: data.mean.1: must be a finite number, got .nan",
        f"{path}:3: data.image_size: must be >= 1 and <= 4096, got 0",
        f"{path}:5: objective.sharpness: must be left out (hff, ff alone have it), got 'sharpness'",
        f"{path}:6: train: must have exactly one of epochs, steps and samples, got epochs and steps",
        f"{path}:9: train.global_batch_size: must be written out (no aliases), got the alias *b",
        f"{path}:10: train.lr: must be > 0, got -1",
        f"{path}:11: train.lr: must be given once, got a duplicate of line 10",
        f"{path}:12: train.optimiser: must be a known key, got 'optimiser'; did you mean 'optimizer'?",
        f"{path}:13: cluster.stages: must be at most 2, the number of layers, got 3",
        "--set: must be key.path=value, got 'nonsense'",
        "--set: train.seed: must be a whole number >= 0, got 'x'",
    ]


def test_a_relation_is_not_judged_by_a_value_that_is_itself_wrong(tmp_path: Path, good_text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(good_text.replace("workers: 2", "workers: -7"))
    assert said(path) == f"{path}:12: cluster.workers: must be >= 1 and <= 65536, got -7"


def test_a_missing_job_file_lists_the_jobs_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mnist.yaml").touch()
    (tmp_path / "cifar10.yaml").touch()
    (tmp_path / "notes.txt").touch()
    path = tmp_path / "minst.yaml"
    assert said(path) == (
        f"{path}: must be a job file, got no such file; did you mean {tmp_path / 'mnist.yaml'}? "
        f"({tmp_path}/ has: cifar10.yaml, mnist.yaml)"
    )


def test_a_missing_job_file_lists_what_the_jobs_folder_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "quickstart.yaml").touch()
    assert said("abc.yaml") == "abc.yaml: must be a job file, got no such file (jobs/ has: quickstart.yaml)"


def test_a_missing_job_file_without_any_jobs_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said("no/x.yaml") == "no/x.yaml: must be a job file, got no such file"


def test_a_directory_is_no_job_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    assert said(tmp_path) == f"{tmp_path}: must be a job file, got a directory ({tmp_path}/ has: a.yaml)"


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    assert said("a\0b") == "a\0b: must be a readable file, got: embedded null byte"
    long = str(tmp_path / ("n" * 300))
    assert said(long) == f"{long}: must be a readable file, got: File name too long"


def test_a_file_of_exactly_one_mebibyte_is_read(tmp_path: Path, good_text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(good_text + "#" * (2**20 - len(good_text)))
    assert path.stat().st_size == 2**20
    assert load_job(path).name == "sample"


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem(tmp_path: Path, good_text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + good_text.replace("\n", "\r\n").encode())
    assert load_job(path).train.lr == 0.001
