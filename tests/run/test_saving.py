"""A disk that is full: older checkpoints stay, training goes on for a while, and nothing torn is left."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hff import HeadOptions, VggOptions, build_layers, make_optimizer
from orchestrator.errors import OrchestratorError
from orchestrator.pipeline.stage import Stage
from orchestrator.run import checkpoint
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder
from orchestrator.run.saving import Saver

LIMIT = 16_384
SMALL, LARGE = 4, 256  # widths of a layer whose files are below and above the limit


@contextmanager
def no_room() -> Iterator[None]:
    """No file of this process can grow beyond the limit: to the writer, a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def saver(folder: RunFolder, width: int) -> Saver:
    (layer,) = build_layers(VggOptions(widths=(width,)), (3, 8, 8), HeadOptions(num_classes=3), seed=0)
    stage = Stage(
        first=0,
        layers=[layer],
        optimizers=[make_optimizer(layer, "adamw", lr=1e-2)],
        receiver=None,
        sender=None,
        learning_rate=lambda step, layer: 1e-2,
        trained=lambda step: None,
        output_shape=(width, 8, 8),
        device=torch.device("cpu"),
    )
    return Saver(folder, 1, stage, Control(1), writes=True, leads=True, keep_last=2)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "a")


def warnings(folder: RunFolder) -> list[str]:
    return [event["text"] for event in folder.read_events()[0] if event["event"] == "warning"]


# In the file of a layer, which the library writes, and in the state, which is ours.
FULL: list[tuple[int, dict[str, Any]]] = [(LARGE, {}), (SMALL, {"ledger": "x" * 2 * LIMIT})]


@pytest.mark.parametrize(("width", "state"), FULL, ids=["layer", "state"])
def test_training_goes_on_after_two_failed_saves_and_the_third_in_a_row_ends_it(
    folder: RunFolder, width: int, state: dict[str, Any]
) -> None:
    saves = saver(folder, width)
    saves.save(1, {"step": 1}, must=False)
    whole = checkpoint.step_folder(folder, 1)
    with no_room():
        for step in (2, 3):
            saves.save(step, state, must=False)
        with pytest.raises(OrchestratorError, match=r"step 4 could not be written: .*3 failures in a row\); make room"):
            saves.save(4, state, must=False)
    assert ["warning 1 of 2" in w for w in warnings(folder)] == [True, False]
    assert "older checkpoints are untouched" in warnings(folder)[1]
    assert checkpoint.newest_valid(folder)[0] == whole
    assert [path.name for path in folder.checkpoints.iterdir()] == [whole.name], "nothing torn is left"


def test_a_save_that_succeeds_makes_the_failures_before_it_forgotten(folder: RunFolder) -> None:
    saves = saver(folder, LARGE)
    for step in range(1, 12, 2):
        with no_room():
            saves.save(step, {"step": step}, must=False)
        saves.save(step + 1, {"step": step + 1}, must=False)
    assert checkpoint.steps_found(folder) == [10, 12]
    assert len(warnings(folder)) == 6


def test_the_last_save_of_a_run_must_succeed(folder: RunFolder) -> None:
    saves = saver(folder, LARGE)
    with no_room(), pytest.raises(OrchestratorError, match="run the same command again"):
        saves.save(1, {"step": 1}, must=True)


def test_a_torn_line_of_events_costs_that_line_alone(folder: RunFolder) -> None:
    folder.path.mkdir()
    folder.append_event({"event": "a"})
    with open(folder.events, "ab") as file:
        file.write(b'{"event": "to')
    assert [event["event"] for event in folder.read_events()[0]] == ["a"]
    folder.append_event({"event": "b"})
    assert [event["event"] for event in folder.read_events()[0]] == ["a", "b"]
