"""The wish to stop: signals and train.max_hours make the same file, which the workers look for at every step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EXIT_INTERRUPTED, Interrupted
from orchestrator.job.load import load_job
from orchestrator.launch.beside import interruptible, stoppable
from orchestrator.launch.drive import Drive, Part
from orchestrator.launch.signals import INTERRUPTED, held_back, interrupting, kept_handlers
from orchestrator.run.folder import RunFolder, write_json
from orchestrator.run.records.start import StartClock
from tests.pipeline.ranks import start_process
from tests.stores import wait_until


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_the_workers_to_save_and_leave(tmp_path: Path, number: signal.Signals) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    folder = RunFolder(tmp_path)
    write_json(folder.progress, {"attempt": 2, "step": 5, "steps_total": 54})
    with stoppable(folder, 2, None, said.append):
        assert not folder.stop_file(2).exists()
        os.kill(os.getpid(), number)
        wait_until(folder.stop_file(2).exists)
    assert said == [f"{number.name}: saving at the end of this step, then leaving (again: leave at once)"]
    assert not folder.stop_file(2).exists(), "it does not stop the next attempt"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("progress", [None, {"attempt": 1, "steps_total": 54}, {"attempt": 2, "steps_total": 0}])
def test_a_signal_while_the_workers_start_promises_no_step(tmp_path: Path, progress: dict[str, int] | None) -> None:
    said: list[str] = []
    folder = RunFolder(tmp_path)
    if progress is not None:
        write_json(folder.progress, {**progress, "step": 0})
    with stoppable(folder, 2, None, said.append):
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(folder.stop_file(2).exists)
    assert said == ["SIGINT: stopping as soon as the workers are there (again: leave at once)"]


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (None, "interrupted before the first step; nothing is lost, the same command starts again"),
        (7, "interrupted; what was saved is kept, the same command goes on from there"),
    ],
)
def test_ctrl_c_outside_an_attempt_is_an_interrupted_run(tmp_path: Path, step: int | None, says: str) -> None:
    folder = RunFolder(tmp_path)
    if step is not None:
        write_json(folder.progress, {"attempt": 1, "step": step, "steps_total": 54})
    with pytest.raises(Interrupted, match=says), interruptible(folder):
        raise KeyboardInterrupt


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with stoppable(RunFolder(tmp_path), 1, None, lambda _: None):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WEXITSTATUS(status) == 128 + signal.SIGINT


def test_when_max_hours_are_over_the_workers_are_asked_to_save_and_leave(tmp_path: Path) -> None:
    said: list[str] = []
    folder = RunFolder(tmp_path)
    began = time.monotonic()
    with stoppable(folder, 1, 0.5 / 3600, said.append):
        wait_until(folder.stop_file(1).exists)
        assert time.monotonic() - began >= 0.5
    assert said[0].startswith("train.max_hours is over: stopping as soon as")


def test_max_hours_are_those_of_all_attempts_together(tiny_job: Callable[..., Path], tmp_path: Path) -> None:
    def drive(*changes: str) -> Drive:
        job = load_job(tiny_job(), changes)
        more = {"launch": None, "part": Part(), "stored": None, "clock": StartClock()}
        return Drive(job, {}, RunFolder(tmp_path), "auto", print, tmp_path, **more)

    limited = drive("train.max_hours=2")
    limited.began -= 0.5 * 3600
    assert limited.hours_left == pytest.approx(1.5, abs=0.01)
    limited.began -= 5 * 3600
    assert limited.hours_left == 0
    assert drive().hours_left is None


def _ignored(results: Any) -> None:
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    results.put([number.name for number in watched if signal.getsignal(number) is signal.SIG_IGN])


def test_a_signal_to_all_processes_ends_no_worker_that_cannot_answer_it_yet() -> None:
    """As Ctrl-C in a terminal is, while workers start."""
    results = multiprocessing.get_context("forkserver").SimpleQueue()
    process = start_process(_ignored, results)
    assert results.get() == ["SIGINT", "SIGTERM", "SIGUSR1"]
    process.join()


def test_a_run_that_ends_before_max_hours_leaves_no_timer_behind(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with stoppable(folder, 1, 0.3 / 3600, lambda said: pytest.fail(said)):
        pass
    time.sleep(0.5)
    assert not folder.stop_file(1).exists()


def signalled(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_outside_of_a_run_interrupts_and_its_handler_is_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interrupting():
        signalled(number)
    assert signal.getsignal(number) is before


def test_an_interruption_waits_until_an_import_has_let_go_of_its_locks() -> None:
    reached: list[str] = []
    text = "os.kill(os.getpid(), signal.SIGTERM)\nreached.append('the end')"
    importing = compile(text, "<frozen importlib._bootstrap>", "exec")

    def importing_signalled() -> None:
        exec(importing, {"os": os, "signal": signal, "reached": reached})
        time.sleep(30)

    with pytest.raises(KeyboardInterrupt), interrupting():
        importing_signalled()
    assert reached == ["the end"]


def test_a_second_interruption_leaves_at_once() -> None:
    child = os.fork()
    if child == 0:
        with interrupting():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
            except KeyboardInterrupt:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(30)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 128 + signal.SIGINT


def test_a_library_that_ends_the_process_at_sigterm_interrupts_instead() -> None:
    def end(number: int, frame: object) -> None:
        sys.exit(1)

    before = signal.getsignal(signal.SIGTERM)

    def library() -> None:
        signal.signal(signal.SIGTERM, end)
        signalled(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), kept_handlers():
        library()
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interruption_that_is_swallowed_ends_the_command_all_the_same() -> None:
    """As a library may do it, or two imports that wait for each other."""
    code = """
import os, signal, time
from orchestrator.launch import signals
signals._PATIENCE_S = 0.2
with signals.interrupting():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stderr) == (EXIT_INTERRUPTED, f"{INTERRUPTED}\n")


def test_an_interruption_within_an_import_of_seconds_counts_at_its_end() -> None:
    reached: list[str] = []

    def importing() -> None:
        with held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            reached.append("the end")
        time.sleep(30)

    with pytest.raises(KeyboardInterrupt), interrupting():
        importing()
    assert reached == ["the end"]


def test_a_run_begins_no_attempt_after_an_interruption_that_a_library_swallowed(tmp_path: Path) -> None:
    folder, said = RunFolder(tmp_path), list[str]()
    with interrupting():
        with suppress(KeyboardInterrupt):
            signalled(signal.SIGTERM)
        with stoppable(folder, 1, None, said.append) as asked:
            assert asked.is_set() and folder.stop_file(1).exists()
    assert said == ["SIGTERM: stopping as soon as the workers are there (again: leave at once)"]
    with stoppable(folder, 2, None, said.append) as asked:
        assert not asked.is_set(), "that was another command's"


def test_an_interruption_needs_no_lock_that_what_it_interrupts_may_hold() -> None:
    """As where it comes while a thread is being started."""
    code = """
import os, signal, threading
from orchestrator.launch.signals import interrupting
try:
    with interrupting(), threading._active_limbo_lock:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(30)
except KeyboardInterrupt:
    os._exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=25).returncode == 7
