"""Exported networks give the scores of the run's files, for any number of images, or nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from orchestrator.cli import main
from orchestrator.errors import CheckpointError, DataError, JobError
from orchestrator.run.inference import export
from orchestrator.run.inference.export import export_run, load_safetensors
from orchestrator.run.inference.trained import trained_run
from tests.run.inference.made_run import CLASSES, TRANSFER, made_run, noise, reference_scores, reference_transfer_scores


def scores_of_torch(path: Path) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    extra = {"model.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return lambda images: program.module()(torch.from_numpy(images)).detach().numpy(), json.loads(extra["model.json"])


def scores_of_onnx(path: Path) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    assert (source.type, source.shape[1]) == ("tensor(uint8)", source.shape[2])
    description = json.loads(session.get_modelmeta().custom_metadata_map["model.json"])
    return lambda images: session.run([target.name], {source.name: images})[0], description


def scores_of_safetensors(path: Path) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    classifier, description = load_safetensors(path)
    return lambda images: classifier(torch.from_numpy(images)).detach().numpy(), description


READERS = {"torch-export": scores_of_torch, "onnx": scores_of_onnx, "safetensors": scores_of_safetensors}


@pytest.mark.parametrize("form", READERS)
def test_an_exported_network_scores_any_number_of_images_like_the_files_of_the_run(form: str, tmp_path: Path) -> None:
    run = made_run(tmp_path)
    done = export_run(run, form, tmp_path / "out.bin")
    scores, description = READERS[form](done.path)
    assert done.difference < 1e-4
    for count in (1, 2, 7):
        images = noise(count)
        found = scores(images)
        assert (found.dtype, found.shape) == (np.float32, (count, len(CLASSES)))
        np.testing.assert_allclose(found, reference_scores(run, images), atol=1e-4, rtol=0)
    assert description["classes"] == CLASSES
    assert description["data"]["mean"] == [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    "form",
    [
        "safetensors",
        pytest.param("torch-export", marks=pytest.mark.slow),
        pytest.param("onnx", marks=pytest.mark.slow),
    ],
)
def test_a_transfer_network_scores_like_timm_on_the_trunk_that_is_exported_for_it(form: str, tmp_path: Path) -> None:
    run = made_run(tmp_path, text=TRANSFER)
    trunk = export_run(run, "timm")
    assert trunk.path == run / "network.timm.safetensors"
    scores, description = READERS[form](export_run(run, form).path)
    images = noise(5, size=67)
    expected = reference_transfer_scores(run, trunk.path, images)
    assert expected.std(axis=0).min() > 1e-3, "scores that do not depend on the image prove nothing"
    np.testing.assert_allclose(scores(images), expected, atol=1e-4, rtol=0)
    assert description["model"]["backbone"] == "test_resnet"


def test_a_run_without_a_trunk_has_none_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(made_run(tmp_path)), "--format", "timm"]) == 2
    assert capsys.readouterr().err == (
        "--format timm: needs a run of kind transfer, got kind train, which has no trunk\n"
    )


def test_a_float64_network_keeps_its_precision_in_safetensors(tmp_path: Path) -> None:
    run = made_run(tmp_path, precision="float64")
    classifier, _ = load_safetensors(export_run(run, "safetensors").path)
    assert {t.dtype for t in classifier.parameters()} == {torch.float64}
    np.testing.assert_allclose(
        classifier(torch.from_numpy(noise(4))).detach().numpy(), reference_scores(run, noise(4)), atol=2e-5, rtol=0
    )


def test_votes_that_the_run_found_stand_above_those_of_its_job(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    (where,) = (run / "checkpoints").iterdir()
    described = trained_run(run).description
    assert described["vote_weights"] is None
    from orchestrator.run import network

    job = trained_run(run).job
    with_found = network.description(job, CLASSES, {"vote_weights": [1.0, 0.0, 0.0]})
    from orchestrator.run.inference.trained import load_classifier

    assert load_classifier(with_found, where).network.weights == (1.0, 0.0, 0.0)
    assert load_classifier(described, where).network.weights == (0.25, 0.0, 2.0)


def test_an_existing_file_is_only_replaced_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path)
    target = run / "network.safetensors"
    target.write_text("mine")
    command = ["export", str(run), "--format", "safetensors"]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"{target}: is there already; give --force to replace it, or --out FILE for another place\n"
    )
    assert target.read_text() == "mine"
    assert main([*command, "--force"]) == 0
    assert capsys.readouterr().out.startswith(f"Written: {target} (scores differ")
    assert load_safetensors(target)[1]["classes"] == CLASSES
    assert {p.name for p in run.iterdir()} == {"job.yaml", "classes.json", "checkpoints", target.name}


def test_an_export_that_scores_otherwise_is_never_given_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A faulty exporter is an outside that cannot be had otherwise: its file reads back with other scores."""
    run = made_run(tmp_path)
    form = export.FORMATS["safetensors"]
    assert form.read is not None
    read = form.read
    faulty = replace(form, read=lambda path: lambda images: read(path)(images) + np.float32(1e-2))
    monkeypatch.setitem(export.FORMATS, "safetensors", faulty)
    with pytest.raises(Exception, match=r"gives other scores than the run's \(by up to 0.01\); nothing was written"):
        export_run(run, "safetensors")
    assert {p.name for p in run.iterdir()} == {"job.yaml", "classes.json", "checkpoints"}


def test_missing_packages_are_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name.startswith("onnx") else object())
    with pytest.raises(JobError) as refused:
        export_run(made_run(tmp_path), "onnx")
    assert str(refused.value) == (
        "--format onnx: needs onnx and onnxscript and onnxruntime, got no such package here; "
        "install what is missing with: pip install 'hff-orchestrator[onnx]'"
    )


def test_a_place_that_is_none_is_refused_before_any_work(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    for out in (tmp_path / "no" / "such.onnx", tmp_path):
        with pytest.raises(JobError) as refused:
            export_run(run, "safetensors", out)
        assert str(refused.value) == f"--out: must be a file in a folder that is there, got {out}"


def test_a_folder_that_is_no_run_or_has_no_checkpoint_is_exit_code_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path), "--format", "onnx"]) == 4
    assert capsys.readouterr().err == f"{tmp_path}: not a run folder (no job.yaml in it); give RUNS/NAME\n"
    run = made_run(tmp_path)
    (run / "checkpoints").rename(run / "elsewhere")
    assert main(["export", str(run), "--format", "safetensors"]) == 4
    assert capsys.readouterr().err == f"{run}: has no checkpoint yet\n"


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"other\.safetensors: is not a network exported by"):
        load_safetensors(path)


def test_an_older_run_takes_its_class_names_from_its_data_or_says_that_they_are_gone(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    (run / "classes.json").unlink()
    with pytest.raises(DataError, match=r"made: the names of its classes are not there: data\.train: .*nowhere"):
        export_run(run, "safetensors")
