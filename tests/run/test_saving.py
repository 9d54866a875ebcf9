"""Saves beside the training, and a disk that is full: what is saved is whole, and older checkpoints stay."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hff import HeadOptions, VggOptions, build_layers
from orchestrator.errors import OrchestratorError
from orchestrator.run import checkpoint
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder
from orchestrator.run.saving import Saver
from tests.stages import lone_stage

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


def saver(folder: RunFolder, width: int, *, background: bool = False) -> Saver:
    (layer,) = build_layers(VggOptions(widths=(width,)), (3, 8, 8), HeadOptions(num_classes=3), seed=0)
    stage = lone_stage([layer])
    return Saver(folder, 1, stage, Control(1), writes=True, leads=True, keep_last=2, background=background)


def settled(saves: Saver, step: int, state: dict[str, Any]) -> None:
    """A save that has ended, in the background or not."""
    saves.save(step, state, must=False)
    saves.drain()
    saves.check()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "a")


def warnings(folder: RunFolder) -> list[str]:
    return [event["text"] for event in folder.read_events()[0] if event["event"] == "warning"]


# In the file of a layer, which the library writes, and in the state, which is ours.
FULL: list[tuple[int, dict[str, Any]]] = [(LARGE, {}), (SMALL, {"ledger": "x" * 2 * LIMIT})]


@pytest.mark.parametrize("background", [False, True], ids=["waited for", "in the background"])
@pytest.mark.parametrize(("width", "state"), FULL, ids=["layer", "state"])
def test_training_goes_on_after_two_failed_saves_and_the_third_in_a_row_ends_it(
    folder: RunFolder, width: int, state: dict[str, Any], background: bool
) -> None:
    saves = saver(folder, width, background=background)
    settled(saves, 1, {"step": 1})
    whole = checkpoint.step_folder(folder, 1)
    with no_room():
        for step in (2, 3):
            settled(saves, step, state)
        with pytest.raises(OrchestratorError, match=r"step 4 could not be written: .*3 failures in a row\); make room"):
            settled(saves, 4, state)
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


@pytest.mark.parametrize("background", [False, True], ids=["waited for", "in the background"])
def test_the_last_save_of_a_run_must_succeed(folder: RunFolder, background: bool) -> None:
    saves = saver(folder, LARGE, background=background)
    with no_room(), pytest.raises(OrchestratorError, match="run the same command again"):
        saves.save(1, {"step": 1}, must=True)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No file of a layer is written before the event is set."""
    moves, write = threading.Event(), checkpoint.save_file

    def slowly(*arguments: Any) -> None:
        assert moves.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", slowly)
    yield moves
    moves.set()


def test_what_is_saved_in_the_background_is_what_was_there_when_training_went_on(
    folder: RunFolder, slow_disk: threading.Event
) -> None:
    saves = saver(folder, SMALL, background=True)
    (layer,), (optimizer,) = saves.stage.layers, saves.stage.optimizers
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = checkpoint.layer_sha256(layer)
    saves.save(1, {"step": 1}, must=False)
    optimizer.step()
    slow_disk.set()
    saves.drain()
    saves.check()
    whole, _ = checkpoint.newest_valid(folder)
    assert whole is not None
    assert checkpoint.layer_sha256(layer) != before, "training went on"
    checkpoint.load_layer(whole, 0, layer, optimizer)
    assert checkpoint.layer_sha256(layer) == before
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("must", [False, True])
def test_a_save_waits_for_the_one_before(folder: RunFolder, slow_disk: threading.Event, must: bool) -> None:
    saves = saver(folder, SMALL, background=True)
    saves.save(1, {"step": 1}, must=False)
    second = threading.Thread(target=saves.save, args=(2, {"step": 2}), kwargs={"must": must})
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert checkpoint.steps_found(folder) == []
    slow_disk.set()
    second.join(60)
    if not must:
        saves.drain()
    assert checkpoint.steps_found(folder) == [1, 2], "the one that must succeed has ended when the call returns"
    waits = [event["training_waited_s"] for event in folder.read_events()[0] if event["event"] == "checkpoint"]
    assert waits[0] < 0.3 <= waits[1], "how long training stood still is written down"


def test_a_torn_line_of_events_costs_that_line_alone(folder: RunFolder) -> None:
    folder.path.mkdir()
    folder.append_event({"event": "a"})
    with open(folder.events, "ab") as file:
        file.write(b'{"event": "to')
    assert [event["event"] for event in folder.read_events()[0]] == ["a"]
    folder.append_event({"event": "b"})
    assert [event["event"] for event in folder.read_events()[0]] == ["a", "b"]


def test_events_read_in_pieces_are_those_read_at_once_and_a_line_counts_when_it_is_whole(folder: RunFolder) -> None:
    folder.path.mkdir()
    found, offset = folder.read_events()
    for step in range(5):
        folder.append_event({"event": "epoch", "step": step})
        written = folder.events.read_bytes()
        folder.events.write_bytes(written[:-7])  # its writer is in the middle of it
        assert folder.read_events(offset) == ([], offset)
        folder.events.write_bytes(written)
        new, offset = folder.read_events(offset)
        found += new
    assert [event["step"] for event in found] == [0, 1, 2, 3, 4]
    assert (found, offset) == folder.read_events()
