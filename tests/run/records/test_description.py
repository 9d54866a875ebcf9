"""What MLflow shows of a run without being asked: what it is, what it was trained on, its network's card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.index import open_index
from orchestrator.data.packing.pack import pack
from orchestrator.run.datasets import Datasets, Part
from orchestrator.run.records import description
from orchestrator.run.records.tracking import client_of, epoch_metrics
from tests.conftest import Command
from tests.runs import summary_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer


def test_a_finished_run_explains_itself_in_mlflow(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, shared_database: Path
) -> None:
    name = f"a-model-of-{tmp_path.name}"
    result = in_process("run", tiny_job(), "--set", f"tracking.registered_model={name}")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "tiny"
    summary = summary_of(run)
    card = (run / "model-card.md").read_text()
    with client_of(f"sqlite:///{shared_database}") as client:
        found = client.get_run(summary["run_id"])
        artifacts = {artifact.path for artifact in client.list_artifacts(summary["run_id"])}
        registered = client.get_model_version(name, "1").description
    assert registered == card
    assert "model-card.md" in artifacts
    told = found.data.tags["mlflow.note.content"]
    assert told.startswith("**tiny**: `vgg` of 3 layers, ")
    assert "trained by `hff` on 1,347 images of 10 classes for 2 epochs in batches of 100, seed 0." in told
    assert f"`orchestrator report {run}`" in told
    inputs = {i.tags[0].value: i.dataset for i in found.inputs.dataset_inputs}
    assert set(inputs) == {"training", "validation"}
    assert {dataset.digest for dataset in inputs.values()} == {summary["index_sha256"][:36]}
    assert json.loads(inputs["training"].profile) == {
        "num_rows": 1347, "num_classes": 10, "index_sha256": summary["index_sha256"],
    }  # fmt: skip
    assert json.loads(inputs["validation"].profile)["num_rows"] == 450
    assert found.data.metrics["system/worker_0_memory_megabytes"] > 50
    assert 0 < found.data.metrics["system/worker_0_cpu_utilization_percentage"] < 1000
    assert found.data.metrics["start/total_seconds"] > 0
    assert f"val top-1 {100 * summary['val_top1']:.2f} %" in card
    assert "images of 8 x 8 pixels, gray, uint8" in card
    assert summary["weights_sha256"][:12] in card and f"runs:/{summary['run_id']}/network" in card


def test_of_many_workers_the_most_that_any_takes_is_one_chart() -> None:
    event = {
        "event": "epoch", "step": 1, "train_loss": [], "images_per_second": 1.0, "learning_rate": 1.0, "val_top1": None,
        "val_top5": None, "layer_val_top1": None,
        "workers": [{"memory_bytes": 1e6 * rank, "cores": 0.5} for rank in range(17)],
    }  # fmt: skip
    system = {key: value for key, value in epoch_metrics(event).items() if key.startswith("system/")}
    assert system == {"system/most_memory_megabytes": 16.0, "system/most_cpu_utilization_percentage": 50.0}
    few = epoch_metrics({**event, "workers": event["workers"][:2]})
    assert few["system/worker_1_memory_megabytes"] == 1.0


def test_a_note_fits_what_mlflow_takes_whatever_the_number_of_stages(tmp_path: Path) -> None:
    pack("digits", tmp_path / "digits")
    index = open_index(tmp_path / "digits")
    part = Part(index, np.arange(index.num_samples))
    stage = {"layers": [0, 1], "replicas": 1, "parameters": 10**9}
    plan = {"layer_names": ["a" * 30] * 2, "stages": [{"index": i, **stage} for i in range(1000)]}
    values = {
        "name": "x", "model": {"arch": "vgg"}, "objective": {"name": "hff"},
        "train": {"steps": 3, "global_batch_size": 9, "seed": 0},
    }  # fmt: skip
    assert len(description.note(values, plan, Datasets(part, part, None), "/shared/runs/x")) < 8000
