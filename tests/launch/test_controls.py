"""Controls of a transfer job: what they change, that they run after it, and what is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.errors import JobError
from orchestrator.job.load import differences, job_to_dict, load_job
from orchestrator.launch import controls

JOB = """\
kind: transfer
name: main
runs: {runs}
data: {{train: digits, val: {{from_train: 0.25}}, image_size: 32}}
model: {{backbone: test_resnet, pretrained: false, heads_at: [1, 3], top_widths: [8]}}
objective: {{name: hff, prototypes_per_class: 2, label_smoothing: 0.1}}
features: {{cache: false}}
train: {{epochs: 1, global_batch_size: 100, lr: 1.0e-2}}
controls: [linear-probe, prototype-last, heads-vote, bp]
cluster: {{launcher: process, workers: 1, stages: 1, max_failures: 0}}
tracking: {{uri: 'sqlite:///{database}'}}
"""


@pytest.fixture
def path(tmp_path: Path, shared_database: Path) -> Path:
    file = tmp_path / "main.yaml"
    file.write_text(JOB.format(runs=tmp_path / "runs", database=shared_database))
    return file


_LAST = "model.heads_at: was [1, 3], is 'last'"
_NO_TOPS = "model.top_widths: was [8], is []"
CHANGES: dict[str, set[str]] = {
    "linear-probe": {_LAST, _NO_TOPS, "objective.name: was 'hff', is 'ce'"},
    "prototype-last": {_LAST, _NO_TOPS},
    "heads-vote": {"model.heads_at: was [1, 3], is 'all'", _NO_TOPS, "model.vote: was 'last', is 'fitted'"},
    "bp": {_LAST, _NO_TOPS, "objective.name: was 'hff', is 'bp'", "model.freeze: was 'all', is 'none'"},
}
OF_PROTOTYPES = {
    *("prototypes_per_class", "margin", "scale", "scale_min", "scale_max"),
    *("learn_scale", "sharpness", "block_size"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_control_differs_from_the_job_in_what_it_controls_for(path: Path, name: str) -> None:
    job = load_job(path)
    control = controls.control_job(job, name, controls._JOBS[name])
    found = {
        line
        for line in differences(job_to_dict(job), job_to_dict(control))
        if line.split(":")[0].removeprefix("objective.") not in OF_PROTOTYPES
    }
    assert found == CHANGES[name]
    assert control.name == f"main-control-{name}"
    assert control.objective.label_smoothing == 0.1


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer
def test_controls_run_after_the_job_and_stand_in_its_summary(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "summary.json"
    wanted = ["--set", "controls=[linear-probe, heads-vote]"]
    assert main(["run", str(path), "--summary", str(out), *wanted]) == 0
    shown = capsys.readouterr().out
    summary = json.loads(out.read_text())
    assert json.loads((tmp_path / "runs" / "main" / "summary.json").read_text()) == summary
    assert list(summary["controls"]) == ["linear-probe", "heads-vote"]
    for name, result in summary["controls"].items():
        own = json.loads((tmp_path / "runs" / f"main-control-{name}" / "summary.json").read_text())
        assert result["val_top1"] == own["val_top1"]
        assert result["run"] == own["name"]
        assert own["index_sha256"] == summary["index_sha256"]
    assert summary["controls"]["heads-vote"]["vote_weights"]
    table = shown[shown.index("Controls of main") :].splitlines()
    assert [line.split()[0] for line in table[2:]] == ["main", "linear-probe", "heads-vote"]
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "runs" / "main"), "--out", str(page)]) == 0
    assert "Controls on the same data" in page.read_text()
    capsys.readouterr()
    assert main(["run", str(path), *wanted]) == 0
    assert capsys.readouterr().out.count("is finished already") == 3


def test_a_train_job_has_no_controls(path: Path) -> None:
    with pytest.raises(JobError, match=r"controls: must be a known key"):
        load_job(path, ["kind=train", "model={arch: mlp, widths: [4]}", "controls=[bp]"])
