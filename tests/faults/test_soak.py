"""The soak in short: `make soak` takes ten minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.soak import soak


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_faults_for_two_minutes_change_nothing_of_the_result(tmp_path: Path) -> None:
    report = soak(tmp_path, minutes=2, epochs=120, seed=1)
    faults = report["faults"]
    assert isinstance(faults, dict)
    assert len(faults) >= 3
    assert report["differences"] == []
    assert report["processes left"] == []
    assert report["temporary files left"] == []
