"""The lines that a run shows say what is meant, and nothing about what is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from orchestrator.job.show import counted
from orchestrator.show.terminal import amount, as_text, plan_table, result_table, scaling_table

STAGE = {
    "index": 0, "layers": [0, 0], "replicas": 1, "parameters": 10, "memory_bytes": 10, "compute_share": 1.0,
    "bytes_sent_per_step": 0,
}  # fmt: skip
PLAN = {
    "workers": 1, "global_batch_size": 50, "steps_per_epoch": 27, "images_per_second": 100.0, "efficiency": 0.8,
    "limiting_stage": 0, "limiting_factor": "none", "losses": {}, "stages": [STAGE], "worker_hours_per_epoch": 1.0,
    "epoch_seconds": 3.0,
}  # fmt: skip


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "name": "x", "layers": [], "val_top1": 0.5, "val_top5": 0.75, "test_top1": None, "test_top5": None, "steps": 1,
        "wall_seconds": 2.0, "images_per_second": 9.0, "pipeline_efficiency": 0.875, "attempts": 1, **changes,
    }  # fmt: skip


def test_one_thing_is_not_spoken_of_as_several() -> None:
    assert [counted(n, "shard") for n in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]
    head = plan_table(PLAN, ["conv0"], job_name="x").splitlines()[0]
    assert head == "Plan of x: 1 worker, 1 stage, batches of 50, 27 steps per epoch"


def test_the_two_efficiencies_have_two_names_and_each_says_what_one_means() -> None:
    plan = plan_table(PLAN, ["conv0"], job_name="x")
    assert "scaling 0.80 (1: the speed of one worker times 1)" in plan
    table = scaling_table([PLAN, {**PLAN, "workers": 2}], job_name="x")
    assert "scaling: images/s over those of one worker times workers" in table
    assert "efficiency" not in plan + table
    result = result_table(summary(), Path("runs/x"), "sqlite:///x.db")
    assert "1 step in 2 s, 9 images/s, pipeline efficiency 0.88 (1: the slowest stage never waits), attempt 1" in result


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "val top-1 50.00 %, top-5 75.00 %"),
        ({"test_top1": 0.25, "test_top5": 1.0}, "val top-1 50.00 %, top-5 75.00 %; test top-1 25.00 %, top-5 100.00 %"),
        ({"val_top1": None, "val_top5": None, "test_top1": 0.25}, "test top-1 25.00 %"),
    ],
)
def test_accuracies_that_were_not_measured_are_not_spoken_of(changes: dict[str, Any], line: str) -> None:
    assert line in result_table(summary(**changes), Path("runs/x"), "sqlite:///x.db").splitlines()


@pytest.mark.parametrize(
    ("predicted", "explained"), [(9.0, False), (7.3, False), (11.2, False), (7.1, True), (900.0, True)]
)
def test_the_predicted_rate_stands_beside_the_measured_one_and_is_explained_where_it_missed(
    predicted: float, explained: bool
) -> None:
    result = result_table(summary(), Path("runs/x"), "sqlite:///x.db", predicted=predicted)
    assert f"1 step in 2 s, 9 images/s (predicted {amount(predicted)}), pipeline efficiency" in result
    assert ("orchestrator plan JOB --profile" in result) is explained


def test_a_run_without_any_accuracy_has_no_line_for_it() -> None:
    without = {"val_top1": None, "val_top5": None, "images_per_second": None, "pipeline_efficiency": None}
    result = result_table(summary(**without), Path("runs/x"), "sqlite:///x.db")
    assert "top-1" not in result.replace("val top-1", "", 1), "the head of the table of layers alone"
    assert "1 step in 2 s, attempt 1" in result.splitlines()


def test_cells_are_shown_as_they_are_whatever_brackets_they_hold() -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("per_layer [all]")
    for cell in ("[nothing, {lr: 0.1}]", "a [/b]", ":cat:"):
        table.add_row(cell)
    assert as_text(table).splitlines() == ["per_layer [all]", "[nothing, {lr: 0.1}]", "a [/b]", ":cat:"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.5, "0.5"), (999.4, "999"), (999.6, "1 k"), (1234567, "1.23 M"), (999_999, "1 M"), (-999_999, "-1 M")],
)
def test_an_amount_has_three_figures_and_no_exponent(number: float, text: str) -> None:
    assert amount(number) == text
