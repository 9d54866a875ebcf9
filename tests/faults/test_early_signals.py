"""Signals before the first attempt of a run or search: one line, exit 75, nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from orchestrator.errors import EXIT_INTERRUPTED
from tests.conftest import ROOT, environment
from tests.processes import Descendants

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

AGAIN = "interrupted before the first step; nothing is lost, the same command starts again\n"
ANY = "interrupted; the same command starts again, or goes on from what was saved\n"
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


def started(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestrator", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def wait_until_it_reads(fifo: Path) -> int:
    """Wait until the command has opened a file that has no writer yet, and give it one that never writes."""
    return os.open(fifo, os.O_WRONLY)


def wait_for_line(stream: IO[str], beginning: str) -> None:
    for line in stream:
        if line.startswith(beginning):
            # What was printed reads on, or the command could block.
            threading.Thread(target=stream.read, daemon=True).start()
            return
    raise AssertionError(f"{beginning!r} was not said")


@pytest.mark.parametrize("number", SIGNALS)
def test_while_the_job_is_read(tmp_path: Path, number: signal.Signals) -> None:
    os.mkfifo(tmp_path / "job.yaml")
    with started("run", tmp_path / "job.yaml") as process:
        writer = wait_until_it_reads(tmp_path / "job.yaml")
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        os.close(writer)
    assert (process.returncode, said) == (EXIT_INTERRUPTED, ANY)


@pytest.mark.parametrize("number", SIGNALS)
def test_while_data_are_looked_at(tiny_job: Callable[..., Path], tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / "set" / "index.json")
    data = f"data={{train: {tmp_path / 'set'}, image_size: 8, channels: 1}}"
    with started("run", tiny_job(), "--set", data) as process, Descendants(process.pid) as below:
        writer = wait_until_it_reads(tmp_path / "set" / "index.json")
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        os.close(writer)
    assert (process.returncode, said) == (EXIT_INTERRUPTED, AGAIN)
    assert below.left() == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after_s", [0.5, 4.0, 10.0])
def test_while_ray_starts(
    tiny_job: Callable[..., Path], tmp_path: Path, number: signal.Signals, after_s: float
) -> None:
    run = started("run", tiny_job(), "--set", "cluster={launcher: ray, workers: 1}")
    with run as process, Descendants(process.pid) as below:
        assert process.stdout is not None and process.stderr is not None
        wait_for_line(process.stdout, "Starting Ray on this machine")
        time.sleep(after_s)
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(120) == EXIT_INTERRUPTED, said
        # Ray ends by SIGTERM while it starts: its agents then look for a killed raylet and its head for a minute.
        left = below.left(90)
    assert said.count("\n") == 1, said
    assert said == AGAIN or "was stopped after step" in said
    assert left == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_a_search_starts(tiny_job: Callable[..., Path], tmp_path: Path, number: signal.Signals) -> None:
    base = tiny_job()
    search = tmp_path / "search.yaml"
    search.write_text(
        f"kind: search\nname: early\nruns: {tmp_path / 'runs'}\nbase: {base}\n"
        "space: {train.lr: {loguniform: [1e-4, 1e-1]}}\nsampler: random\nsamples: 2\n"
        f"tracking: {{uri: 'sqlite:///{tmp_path / 'm.db'}'}}\n"
    )
    with started("run", search) as process, Descendants(process.pid) as below:
        assert process.stdout is not None and process.stderr is not None
        wait_for_line(process.stdout, "Starting Ray on this machine")
        time.sleep(2.0)
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(120) == EXIT_INTERRUPTED, said
        left = below.left(30)
    assert said == ANY
    assert left == []
