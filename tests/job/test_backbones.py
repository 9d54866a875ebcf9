"""Names of backbones are checked against timm's own registry, without importing it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import JobError
from orchestrator.job import backbones
from orchestrator.job.load import load_job
from tests.conftest import ROOT, environment

JOB = """\
kind: transfer
name: sample
data: {train: data/shards}
model: {backbone: resnet10t, pretrained: false}
objective: {name: hff}
train: {epochs: 1, global_batch_size: 10, lr: 1e-3}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(JOB)
    return path


def said(path: Path, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    return str(caught.value)


def test_the_names_read_from_its_source_are_those_that_timm_lists() -> None:
    import timm

    assert backbones.names() == set(timm.list_models())


def test_every_tag_that_timm_publishes_is_accepted() -> None:
    import timm

    assert [name for name in timm.list_pretrained() if backbones.fault(name)] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5o", "must be a timm model, got 'resnet5o'; closest: resnet50, resnet51q, resnet50t"),
        (
            "resnet10t.c4_in1k",
            "must be a timm model with weights of that tag, got 'resnet10t.c4_in1k'; closest: resnet10t.c3_in1k",
        ),
        (
            "hf_hub:me/mine",
            "must be a name that timm has (weights from elsewhere: model.pretrained: FILE), got 'hf_hub:me/mine'",
        ),
    ],
)
def test_an_unknown_backbone_is_refused_with_the_closest_ones(job: Path, name: str, message: str) -> None:
    assert said(job, f"model.backbone={name}") == f"--set: model.backbone: {message}"


def test_blocks_of_layers_are_refused_where_stages_are_the_units(job: Path) -> None:
    assert said(job, "objective.block_size=2") == (
        "--set: objective.block_size: must be 1 (its units are the backbone's stages: model.heads_at), got 2"
    )


def test_a_transfer_job_is_checked_in_two_seconds_without_torch_and_timm(job: Path) -> None:
    code = (
        "import sys; from orchestrator.cli import main; code = main(['check', sys.argv[1]]); "
        "print([m for m in ('torch', 'timm', 'torchvision') if m in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(job)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, so that a busy machine does not change the answer.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
