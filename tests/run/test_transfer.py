"""Transfer runs from the job file to the summary, in this process and as a pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hff.votes import fit_vote_weights
from orchestrator.cli import main
from orchestrator.data.index import open_index
from orchestrator.data.reader import ShardReader
from orchestrator.data.split import hold_out, split_from_train
from orchestrator.errors import CheckpointError, DataError, JobError
from orchestrator.job.load import job_to_dict, load_job
from orchestrator.launch.driver import run_job
from orchestrator.run.inference.classifier import pixels
from orchestrator.run.inference.trained import trained_run
from orchestrator.transfer.resolve import resolve
from tests.runs import assert_same_bits, newest, summary_of

JOB = """\
kind: transfer
name: {name}
runs: {runs}
data: {{train: digits, val: {{from_train: 0.25}}, image_size: 32}}
model: {{backbone: test_resnet, pretrained: false, heads_at: all, vote: fitted}}
objective: {{name: hff}}
features: {{cache: false}}
train: {{epochs: 1, global_batch_size: 100, lr: 1.0e-2}}
cluster: {{launcher: process, workers: 1, stages: 1, threads_per_worker: 1, timeout_s: 120, max_failures: 0}}
tracking: {{uri: 'sqlite:///{database}'}}
"""
Run = Callable[..., Path]


def whole_model() -> dict[str, torch.Tensor]:
    import timm

    return timm.create_model("test_resnet").state_dict()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def job_file(folder: Path, shared_database: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(JOB.format(name=name, runs=folder / "runs", database=shared_database))
        return path

    return write


@pytest.fixture(scope="module")
def run(job_file: Callable[[str], Path], folder: Path) -> Run:
    """Run the small job with overrides, in this process where it has one worker; the folder of the run."""

    def start(name: str, *overrides: str) -> Path:
        run_job(load_job(job_file(name), overrides), say=lambda line: None)
        return folder / "runs" / name

    return start


@pytest.fixture(scope="module")
def alone(run: Run) -> Path:
    return run("alone")


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer
def test_two_stages_give_the_bits_of_one_process_and_the_same_vote(run: Run, alone: Path) -> None:
    piped = run("piped", "cluster.workers=2", "cluster.stages=2")
    assert_same_bits(alone, piped)
    assert summary_of(piped)["vote_weights"] == summary_of(alone)["vote_weights"]
    assert summary_of(piped)["stages"] == 2


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer
def test_the_saved_job_says_what_only_the_backbone_knew(alone: Path) -> None:
    job = job_to_dict(load_job(alone / "job.yaml"))
    assert (job["data"]["mean"], job["data"]["std"]) == ([0.5] * 3, [0.5] * 3)
    assert (job["data"]["crop_share"], job["data"]["interpolation"]) == (0.95, "bilinear")
    assert job["model"]["heads_at"] == [0, 1, 2, 3]
    assert job_to_dict(resolve(load_job(alone / "job.yaml"))) == job, "resolving again changes nothing"


def test_vote_weights_are_fitted_on_images_that_nobody_trained_on(alone: Path) -> None:
    """Held out, classified with the saved weights and fitted again, here."""
    summary = summary_of(alone)
    index = open_index(alone.parent / ".data" / "digits")
    train, _ = split_from_train(index, 0.25)
    rest, held = hold_out(index, train, 0.1, purpose="vote", remedy="")
    assert summary["samples_per_epoch"] == len(rest)
    assert len(np.intersect1d(rest, held)) == 0
    assert sorted([*rest, *held]) == train.tolist()
    classifier = trained_run(alone).classifier()
    data = trained_run(alone).description["data"]
    images = torch.from_numpy(np.stack([pixels(ShardReader(index).read(int(i))[2], data) for i in held]))
    with torch.no_grad():
        scores = torch.stack(classifier.layer_scores(images), dim=1)
    weights = fit_vote_weights(scores, torch.from_numpy(index.labels[held]))
    assert summary["vote_weights"] == pytest.approx(weights, rel=1e-3, abs=1e-3)
    assert json.loads((newest(alone) / "state.json").read_text())["vote_weights"] == summary["vote_weights"]


def test_eval_and_predictions_use_the_fitted_votes(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    assert main(["eval", str(alone), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["top1"] == pytest.approx(summary_of(alone)["val_top1"])
    index = open_index(alone.parent / ".data" / "digits")
    _, val = split_from_train(index, 0.25)
    trained = trained_run(alone)
    images = np.stack([pixels(ShardReader(index).read(int(i))[2], trained.description["data"]) for i in val])
    with torch.no_grad():
        scores = trained.classifier()(torch.from_numpy(images))
    right = (scores.argmax(dim=1).numpy() == index.labels[val]).mean()
    assert right == pytest.approx(summary_of(alone)["val_top1"])


def test_the_frozen_trunk_is_saved_as_the_seed_made_it(alone: Path) -> None:
    from orchestrator.transfer.backbone import build_trunk

    stages = build_trunk("test_resnet", False, 32, seed=0)
    for number, stage in enumerate(stages):
        saved = load_file(newest(alone) / f"layer_{number:02d}.safetensors")
        for key, value in stage.state_dict().items():
            assert torch.equal(saved[f"body.stage{number}.module.{key}"], value)
        state = load_file(newest(alone) / f"layer_{number:02d}.optim.safetensors")
        assert {key.split("/")[0] for key in state} == {"head.prototypes", "head.raw_scale"}


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer
def test_a_trunk_pretrained_by_a_job_is_what_the_next_job_starts_from(run: Run, folder: Path) -> None:
    whole = run("pretrain", "objective={name: bp}", "model.freeze=none", "model.vote=last", "train.epochs=2")
    file = folder / "trunk.safetensors"
    assert main(["export", str(whole), "--format", "timm", "--out", str(file)]) == 0
    probe = run("probe", f"model.pretrained={file}", "model.heads_at=last", "model.vote=last", "objective={name: ce}")
    (trained,), (taken,) = ([load_file(p) for p in newest(r).glob("layer_??.safetensors")] for r in (whole, probe))
    for key, value in taken.items():
        if key.startswith("body."):
            assert torch.equal(value, trained[key.replace(".module.", ".")])
    file.unlink()
    assert main(["eval", str(probe)]) == 0, "a finished run needs the file no more"


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer
def test_a_run_goes_on_in_mid_epoch_to_the_same_weights_and_votes_without_the_weights_file(
    run: Run, folder: Path
) -> None:
    file = folder / "start.safetensors"
    tensors = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in whole_model().items()}
    save_file(tensors, file)
    settings = (f"model.pretrained={file}", "model.freeze=2", "checkpoint.every_steps=7", "features.cache=true")
    going_on = run("going-on", *settings)
    before = summary_of(going_on)
    (going_on / "summary.json").unlink()
    shutil.rmtree(newest(going_on))
    assert newest(going_on).name == "step_000000007", "in the middle of the only epoch of 13 steps"
    file.unlink()
    run("going-on", *settings)
    after = summary_of(going_on)
    assert after["attempt_steps"] == [[0, 13], [7, 13]]
    for key in ("weights_sha256", "order_sha256", "vote_weights", "val_top1"):
        assert after[key] == before[key], key


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer
def test_weights_that_do_not_fit_stop_the_run_before_it_begins(run: Run, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        run("unfit", f"model.pretrained={folder / 'none.safetensors'}")
    assert not (folder / "runs" / "unfit" / "job.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.vote=[1, 2]"], "x: model.vote: must have one weight for each of the 4 layers, got 2"),
        (
            ["cluster.workers=5", "cluster.stages=5"],
            "x: cluster.stages: must be at most 4, the number of layers, got 5",
        ),
        (
            ["data.image_size=0", "data.augment={cutout: 200}"],
            "x: data.augment.cutout: must be at most data.image_size (160), got 200",
        ),
        (["model.heads_at=[9]"], "model.heads_at: must number stages of test_resnet from 0 to 3, got 9"),
    ],
)
def test_what_only_the_backbone_can_tell_is_refused_before_the_run(
    job_file: Callable[[str], Path], overrides: list[str], message: str
) -> None:
    with pytest.raises(JobError) as caught:
        run_job(load_job(job_file("x"), overrides), say=lambda line: None)
    assert str(caught.value) == message


def test_too_few_images_for_a_vote_are_said_with_the_remedy(run: Run) -> None:
    with pytest.raises(DataError) as caught:
        run("few", "train.vote_from_train=0.001")
    assert str(caught.value).endswith(
        "0.001 of them cannot be held out; use another train.vote_from_train, or model.vote: last"
    )
