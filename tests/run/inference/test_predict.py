"""`orchestrator predict`: probabilities of the vote and of every layer; files that are no images are named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.cli import main
from tests.run.inference.made_run import CLASSES, made_run, noise, reference_layer_scores, reference_scores


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_run(tmp_path / "runs")


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def written(folder: Path, images: Any) -> list[str]:
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, pixels in zip(paths, images, strict=True):
        path.write_bytes(png(pixels))
    return [str(p) for p in paths]


def softmax(score: Any) -> Any:
    e = np.exp(score - score.max())
    return e / e.sum()


def test_predictions_are_the_softmax_of_the_vote_and_of_each_layer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = noise(3)
    files = written(tmp_path, images)
    assert main(["predict", str(run), *files, "--json", "-", "--top", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores, layers = reference_scores(run, images), reference_layer_scores(run, images)
    assert [f["image"] for f in found] == files
    for i, prediction in enumerate(found):
        chance = softmax(scores[i])
        order = np.argsort(-chance)[:4]
        assert [g["label"] for g in prediction["top"]] == [CLASSES[k] for k in order]
        assert [g["probability"] for g in prediction["top"]] == pytest.approx(chance[order], abs=1e-5)
        assert [v["weight"] for v in prediction["layers"]] == [0.25, 0, 2]
        for k, vote in enumerate(prediction["layers"]):
            own = np.exp(layers[k][i])
            assert vote["name"] == f"conv{k}"
            assert vote["choice"] == {"label": CLASSES[own.argmax()], "probability": pytest.approx(own.max(), abs=1e-5)}
            assert vote["probability_of_winner"] == pytest.approx(own[order[0]], abs=1e-5)


def test_the_table_shows_five_classes_and_every_layer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = written(tmp_path, noise(1))
    out = tmp_path / "p.json"
    assert main(["predict", str(run), file, "--json", str(out)]) == 0
    (prediction,) = json.loads(out.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == file
    shown = [line.split() for line in lines[1:6]]
    assert [words[0] for words in shown] == [g["label"] for g in prediction["top"]]
    assert [f"{100 * g['probability']:.2f}" for g in prediction["top"]] == [words[1] for words in shown]
    assert f"for {prediction['top'][0]['label']}" in lines[7]
    assert [line.split()[1] for line in lines[8:11]] == ["conv0", "conv1", "conv2"]


def test_every_file_that_is_no_image_is_named_and_nothing_is_predicted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (good,) = written(tmp_path, noise(1))
    text, cut, gone = tmp_path / "a.jpg", tmp_path / "b.png", tmp_path / "c.jpg"
    text.write_text("<html>")
    cut.write_bytes(Path(good).read_bytes()[:60])
    folder = tmp_path / "d"
    folder.mkdir()
    assert main(["predict", str(run), good, *map(str, (text, cut, gone, folder))]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second, third, fourth = captured.err.splitlines()
    assert first == f"{text}: must be a JPEG or PNG image, got: neither JPEG nor PNG by its first bytes"
    assert second.startswith(f"{cut}: must be a JPEG or PNG image, got: ")
    assert third == f"{gone}: cannot be read: No such file or directory"
    assert fourth == f"{folder}: is a folder; give the image files in it: {folder}/*"


@pytest.mark.parametrize("top", ["0", "x", "-1", "1.5"])
def test_a_number_of_classes_that_is_none_is_refused(top: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "runs/x", "a.jpg", f"--top={top}"]) == 2
    assert capsys.readouterr().err == f"--top: must be a whole number >= 1, got {top!r}\n"


def test_asking_for_more_classes_than_there_are_shows_all(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run), *written(tmp_path, noise(1)), "--json", "-", "--top", "99"]) == 0
    (prediction,) = json.loads(capsys.readouterr().out)
    assert len(prediction["top"]) == len(CLASSES)
    assert sum(g["probability"] for g in prediction["top"]) == pytest.approx(1)


def test_no_more_than_a_batch_of_images_goes_through_the_network_at_once_and_all_are_answered(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = noise(130)
    assert main(["predict", str(run), *written(tmp_path, images), "--json", "-", "--top", "1"]) == 0
    found = [p["top"][0]["label"] for p in json.loads(capsys.readouterr().out)]
    assert found == [CLASSES[k] for k in reference_scores(run, images).argmax(axis=1)]


def test_who_looks_on_is_told_what_the_first_seconds_are_for_and_a_pipe_is_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["predict", str(run), *written(tmp_path, noise(1)), "--json", "-"]
    for looks_on in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda looks_on=looks_on: looks_on)
        assert main(command) == 0
        captured = capsys.readouterr()
        assert (captured.err.splitlines()[0] == f"Reading the network of {run} ...") is looks_on
        assert json.loads(captured.out)[0]["image"] == command[2]
