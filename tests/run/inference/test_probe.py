"""`orchestrator eval --probe`: of a real run, on its page, in MLflow; and a run that cannot be probed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import EXIT_DONE, EXIT_JOB
from orchestrator.run.records import tracking
from tests.conftest import TINY_JOB, Command
from tests.run.test_forward_forward import FF_JOB
from tests.runs import summary_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer


def test_a_run_is_probed_shown_on_its_page_and_tracked(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, shared_database: Path
) -> None:
    assert in_process("run", tiny_job("tiny", TINY_JOB)).returncode == EXIT_DONE
    run = tmp_path / "runs" / "tiny"
    done = in_process("eval", run, "--probe")
    assert done.returncode == EXIT_DONE, done.stderr
    summary, found = summary_of(run), json.loads((run / "probe.json").read_text())
    assert (found["fitted_on"], found["samples"]) == (1347, 450)
    assert [layer["top1"] for layer in found["layers"]] == [layer["val_top1"] for layer in summary["layers"]]
    for layer in found["layers"]:
        assert layer["probe_raw"] > 0.9
        assert layer["probe_normalised"] > 0.9
        assert 16 < layer["scale"] < 64
        assert layer["prototypes"] == 20
        assert sum(map(sum, layer["usage"])) == 450
        assert len(layer["similarity"]) == 10
        assert max(max(row) for row in layer["similarity"]) == 1.0
    assert "fitted on 1347 training images, top-1 on 450" in done.stdout
    shutil.rmtree(tmp_path / "runs" / ".data")
    done = in_process("eval", run, "--probe")
    assert done.returncode == EXIT_DONE, "a run that was brought from elsewhere has no embedded data yet"
    page = tmp_path / "page.html"
    assert in_process("report", run, "--out", page).returncode == EXIT_DONE
    text = page.read_text()
    for title in ("What a linear classifier reads from each layer", "Cosines between the prototypes of layer 2",
                  "Samples nearest to each prototype of layer 0", "Scale of each layer"):  # fmt: skip
        assert title in text, title
    with tracking.client_of(f"sqlite:///{shared_database}") as client:
        metrics = client.get_run(summary["run_id"]).data.metrics
        artifacts = {entry.path for entry in client.list_artifacts(summary["run_id"])}
    assert metrics["layer/01/probe_normalised"] == found["layers"][1]["probe_normalised"]
    assert metrics["layer/02/scale"] == pytest.approx(found["layers"][2]["scale"])
    assert "confusion.json" in artifacts


def test_forward_forward_cannot_be_probed(tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path) -> None:
    text = FF_JOB.replace("epochs: 8", "steps: 3")
    assert in_process("run", tiny_job("tiny", text)).returncode == EXIT_DONE
    run = tmp_path / "runs" / "tiny"
    done = in_process("eval", run, "--probe")
    assert done.returncode == EXIT_JOB
    assert done.stderr.strip() == (
        f"{run}: a layer of objective ff has an output for each class of an image, not one to probe"
    )
