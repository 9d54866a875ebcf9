"""The wish to stop: signals and train.max_hours make the same file, which the workers look for at every step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from orchestrator.launch.beside import stoppable
from orchestrator.run.folder import RunFolder
from tests.stores import wait_until


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_the_workers_to_save_and_leave(tmp_path: Path, number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    folder = RunFolder(tmp_path)
    with stoppable(folder, 2, None, said.append):
        assert not folder.stop_file(2).exists()
        os.kill(os.getpid(), number)
        wait_until(folder.stop_file(2).exists)
    assert said == [f"{number.name}: saving at the end of this step, then leaving (again: leave at once)"]
    assert not folder.stop_file(2).exists(), "it does not stop the next attempt"
    assert signal.getsignal(number) == before


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with stoppable(RunFolder(tmp_path), 1, None, lambda _: None):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        os._exit(0)
    began = time.monotonic()
    _, status = os.waitpid(pid, 0)
    assert time.monotonic() - began < 4
    assert os.WEXITSTATUS(status) == 128 + signal.SIGINT


def test_when_max_hours_are_over_the_workers_are_asked_to_save_and_leave(tmp_path: Path) -> None:
    said: list[str] = []
    folder = RunFolder(tmp_path)
    began = time.monotonic()
    with stoppable(folder, 1, 0.5 / 3600, said.append):
        wait_until(folder.stop_file(1).exists)
        assert time.monotonic() - began >= 0.5
    assert said[0].startswith("train.max_hours is over: saving")


def test_a_run_that_ends_before_max_hours_leaves_no_timer_behind(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with stoppable(folder, 1, 0.3 / 3600, lambda said: pytest.fail(said)):
        pass
    time.sleep(0.5)
    assert not folder.stop_file(1).exists()
