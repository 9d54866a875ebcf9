"""What docs/python-api.md shows runs, and lists what there is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hff
import orchestrator
from orchestrator import run_job
from orchestrator.errors import DataError, JobError
from tests.conftest import ROOT, SUMMARY_KEYS

PAGE = (ROOT / "docs/python-api.md").read_text()
NOTEBOOK, JOBS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run_block(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(source, "docs/python-api.md", "exec"), names)
    return names


def test_the_notebook_example_trains_a_greedy_network() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on a busy machine wait for each other
    try:
        assert run_block(NOTEBOOK)["accuracy"] > 0.85
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_example_of_a_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    monkeypatch.chdir(tmp_path)
    summary = run_block(JOBS)["summary"]
    assert (summary["name"], summary["epochs"]) == ("from-python", 2)
    assert summary["val_top1"] > 0.8


def test_run_job_returns_the_summary_and_a_finished_run_gives_it_again(tiny_job: Callable[..., Path]) -> None:
    path = tiny_job()
    summary = run_job(path, {"train.epochs": 1, "model.widths": [4, 4], "model.pool_after": [], "tracking.uri": None})
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["epochs"], len(summary["layers"])) == (1, 2)
    changes = {"train.epochs": 1, "model.widths": (4, 4), "model.pool_after": (), "tracking.uri": None}
    assert run_job(str(path), changes) == summary


def test_run_job_raises_what_the_command_line_says(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"^--set: train\.lr: must be > 0, got -1$"):
        run_job(tiny_job(), {"train.lr": -1})
    data = {"train": str(tmp_path / "nothing"), "image_size": 8}
    with pytest.raises(DataError, match=r"^--set: data\.train: .*nothing: there is no such folder"):
        run_job(tiny_job(), {"data": data})


def test_the_page_lists_the_whole_surface() -> None:
    named = set(re.findall(r"\w+", " ".join(re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE))))
    assert set(hff.__all__) <= named
    assert {name.strip("_") for name in orchestrator.__all__} <= {name.strip("_") for name in named}
