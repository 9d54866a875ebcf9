"""The surest mistakes are the same for any number of replicas, and are what the network says of these very images."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.data.index import open_index
from orchestrator.data.names import source_names
from orchestrator.data.packing.pack import pack
from orchestrator.data.reader import ShardReader
from orchestrator.run.inference.predict import predict_images
from orchestrator.run.records.mistakes import Mistake, MistakesOfPart, described, together
from tests.conftest import Command

SAMPLES, CLASSES = 103, 7


def split(vote_NC: torch.Tensor, target_N: torch.Tensor, batch: int, replicas: int, most: int) -> list[Mistake]:
    """What replicas find that share every batch, the last one ragged and some parts empty."""
    parts = [MistakesOfPart(most) for _ in range(replicas)]
    for start in range(0, len(target_N), batch):
        size = min(batch, len(target_N) - start)
        borders = [start + size * r // replicas for r in range(replicas + 1)]
        for part, a, b in zip(parts, borders, borders[1:], strict=False):
            part.add(vote_NC[a:b], target_N[a:b])
    return together(parts)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("batch", [4, 20, 103])
def test_they_do_not_depend_on_batches_and_replicas(batch: int, replicas: int) -> None:
    generator = torch.Generator().manual_seed(3)
    vote_NC = 3 * torch.randn(SAMPLES, CLASSES, generator=generator)
    target_N = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    expected = []
    for position, (vote, target) in enumerate(zip(vote_NC.double().numpy(), target_N.tolist(), strict=True)):
        odds = np.exp(vote) / np.exp(vote).sum()
        if odds.argmax() != target:
            expected.append((odds.max(), position, target, int(odds.argmax())))
    expected.sort(reverse=True)
    found = split(vote_NC, target_N, batch, replicas, most=9)
    assert [(m.position, m.target, m.predicted) for m in found] == [row[1:] for row in expected[:9]]
    assert [m.probability for m in found] == pytest.approx([row[0] for row in expected[:9]], rel=1e-5)


def test_a_network_without_mistakes_has_none() -> None:
    assert split(torch.eye(CLASSES), torch.arange(CLASSES), 3, 2, most=9) == []
    assert together([]) == []


def test_a_run_keeps_the_images_with_what_its_network_says_of_them(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    more = ("--set", "train={steps: 5, global_batch_size: 50, lr: 1e-3}")
    assert in_process("run", tiny_job(), *more).returncode == 0
    run = tmp_path / "runs" / "tiny"
    shown = json.loads((run / "mistakes.json").read_text())
    assert len(shown) == 24, "a network of five steps makes mistakes enough"
    index = open_index(tmp_path / "runs" / ".data" / "digits")
    reader = ShardReader(index)
    rows = {key: i for i, key in enumerate(index.keys(np.arange(index.num_samples)))}
    files = []
    for m in shown:
        assert m["target"] == index.classes[index.labels[rows[m["key"]]]] != m["predicted"]
        assert m["name"].split("/")[0] == m["target"], "the name in the source, CLASS/IMAGE"
        data = reader.read(rows[m["key"]])[2]
        files.append(tmp_path / f"{m['key']}.png")
        files[-1].write_bytes(data)
        with Image.open(io.BytesIO(base64.b64decode(m["jpeg"]))) as image:
            assert image.size == (96, 96)
    for m, prediction in zip(shown, predict_images(run, files, top=1), strict=True):
        assert prediction.top[0].label == m["predicted"]
        assert prediction.top[0].probability == pytest.approx(m["probability"], rel=1e-4)
    probabilities = [m["probability"] for m in shown]
    assert probabilities == sorted(probabilities, reverse=True)
    report = tmp_path / "report.html"
    assert in_process("report", run, "--out", report).returncode == 0
    assert (
        f"called {shown[0]['predicted']}<br>{100 * shown[0]['probability']:.1f} %<br>{shown[0]['name']}<"
        in report.read_text()
    )


def test_an_image_that_can_no_longer_be_read_is_left_out_and_the_rest_is_said(tmp_path: Path) -> None:
    pack("digits", tmp_path / "digits")
    index = open_index(tmp_path / "digits")
    for shard in (tmp_path / "digits").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    (row,) = described([Mistake(0.9, 1, 2, 3)], index, np.array([5, 6]))
    (name,) = source_names(index, index.keys([6])).values()
    assert row == {
        "key": index.keys([6])[0],
        "name": name,
        "target": "2",
        "predicted": "3",
        "probability": 0.9,
        "jpeg": None,
    }
