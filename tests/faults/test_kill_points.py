"""A save that is killed, anywhere, by SIGKILL: never a wrong load, nothing left, and the next save works."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hff import HeadOptions, LocalLayer, VggOptions, build_layers, local_forward_backward, local_update, make_optimizer
from orchestrator.run import checkpoint
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder
from orchestrator.run.saving import Saver
from tests.stages import lone_stage

KEPT = 2
State = list[tuple[LocalLayer, torch.optim.Optimizer]]


def network(steps: int) -> State:
    """Two layers that have been trained for so many steps."""
    layers = build_layers(VggOptions(widths=(4, 5)), (3, 8, 8), HeadOptions(num_classes=3), seed=0)
    state = [(layer, make_optimizer(layer, "adamw", lr=1e-2)) for layer in layers]
    for step in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        for layer, optimizer in state:
            x = local_forward_backward(layer, x, torch.tensor([0, 1, 2, 1]), count=4).output
            local_update(layer, optimizer)
    return state


def hashes(state: State) -> list[str]:
    return [checkpoint.layer_sha256(layer) for layer, _ in state]


def save(folder: RunFolder, step: int, state: State, attempt: int = 1) -> None:
    """What a run of one worker does to save, in a thread beside the training."""
    stage = lone_stage([layer for layer, _ in state], optimizers=[optimizer for _, optimizer in state])
    saver = Saver(folder, attempt, stage, Control(1), writes=True, leads=True, keep_last=KEPT, background=True)
    saver.save(step, {"step": step}, must=False)
    saver.drain()
    saver.check()


@pytest.fixture(scope="module")
def states() -> dict[int, State]:
    return {step: network(step) for step in (1, 2, 3)}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, states: dict[int, State]) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    folder = RunFolder(tmp_path_factory.mktemp("before"))
    for step in (1, 2):
        save(folder, step, states[step])
    return folder.path


def killed(in_child: Callable[[], None]) -> bool:
    """Whether a forked process was killed while it ran `in_child`; the test fails when it failed otherwise."""
    pid = os.fork()
    if pid == 0:
        try:
            in_child()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_at(event: int) -> None:
    """Send this process SIGKILL just before its `event`-th look at, or change of, the file system."""
    seen = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name == "open" or name.startswith(("os.", "shutil.")):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_when_a_file_reaches(size: int) -> None:
    """Let the system kill this process in the middle of the write that makes a file larger than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def goes_on_from(folder: RunFolder, states: dict[int, State]) -> int:
    """The step of the checkpoint that counts, after its bits were compared with those that were to be saved."""
    checkpoint.remove_leftovers(folder)
    assert all(path.name.startswith("step_") for path in folder.checkpoints.iterdir()), "leftovers"
    newest, _ = checkpoint.newest_valid(folder)
    assert newest is not None
    step = int(checkpoint.read_state(newest)["step"])
    assert newest == checkpoint.step_folder(folder, step)
    loaded = network(0)
    for i, (layer, optimizer) in enumerate(loaded):
        checkpoint.load_layer(newest, i, layer, optimizer)
    assert hashes(loaded) == hashes(states[step])
    return step


def test_killed_at_any_step_of_a_save_a_run_has_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, before: Path, states: dict[int, State]
) -> None:
    found = []
    for event in range(1, 500):
        folder = RunFolder(tmp_path / str(event))
        shutil.copytree(before, folder.path)

        def save_and_die(folder: RunFolder = folder, event: int = event) -> None:
            kill_at(event)
            save(folder, 3, states[3])

        died = killed(save_and_die)
        found.append(goes_on_from(folder, states))
        save(folder, 3, states[3], attempt=2)
        assert checkpoint.steps_found(folder) == [2, 3]
        assert goes_on_from(folder, states) == 3
        if not died:
            break
    assert len(found) > 20, "every file of two layers, state and manifest, and the removal of the oldest"
    assert found == sorted(found), "the new one counts from one moment on"
    assert set(found) == {2, 3}


def test_killed_while_any_file_grows_a_run_has_the_old_checkpoint(
    tmp_path: Path, before: Path, states: dict[int, State]
) -> None:
    sizes = {path.stat().st_size for path in checkpoint.step_folder(RunFolder(before), 2).iterdir()}
    for size in sorted(sizes):
        folder = RunFolder(tmp_path / str(size))
        shutil.copytree(before, folder.path)

        def save_and_die(folder: RunFolder = folder, size: int = size) -> None:
            kill_when_a_file_reaches(size - 1)
            save(folder, 3, states[3])

        assert killed(save_and_die)
        assert list(folder.checkpoints.glob(".step_*.tmp/*")), "it was killed while it wrote"
        assert goes_on_from(folder, states) == 2
