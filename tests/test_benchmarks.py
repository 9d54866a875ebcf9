"""Benchmarks look into the transports that they count; a change there must not leave them behind."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_pipeline_is_compared_with_all_of_its_peers() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pipeline", "--smoke"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ours, *others = [line for line in done.stdout.splitlines() if "'method'" in line]
    assert "'local, 2 stages, shm'" in ours and "None" not in ours
    assert len(others) == 7
