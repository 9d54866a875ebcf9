"""The pages in a real browser, at the width of a desk and of a phone: all in view, all loaded, all to be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.show.pages.browser import WIDTHS, browser, measured, picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser() is None, reason="no Chromium here (on Debian: apt-get install chromium)"),
]


@pytest.fixture
def pages(tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path) -> dict[str, Path]:
    """One run with a trace, two side by side, and a set of images."""
    trace = ("--set", "tracking.trace_steps=4")
    assert in_process("run", tiny_job("one"), *trace).returncode == 0
    assert in_process("run", tiny_job("another"), "--set", "train.lr=1e-2").returncode == 0
    runs = tmp_path / "runs"
    found = {name: tmp_path / f"{name}.html" for name in ("run", "comparison", "data")}
    assert in_process("report", runs / "one", "--out", found["run"]).returncode == 0
    assert in_process("report", runs / "one", runs / "another", "--out", found["comparison"]).returncode == 0
    assert in_process("data", "stats", runs / ".data" / "digits", "--html", found["data"]).returncode == 0
    return found


def test_every_page_fits_a_desk_and_a_phone_and_loads_nothing(pages: dict[str, Path], tmp_path: Path) -> None:
    shown = Path(os.environ.get("ORCHESTRATOR_PICTURES", tmp_path))
    for name, page in pages.items():
        for width in WIDTHS:
            picture(page, width, shown / f"{name}-{width}.png", scratch=tmp_path)
            assert (shown / f"{name}-{width}.png").stat().st_size > 10_000
            found = measured(page, width, tmp_path)
            assert found["width"] == width
            assert (found["overflow"], found["outside"]) == (0, []), f"{name} at {width}"
            assert (found["broken"], found["requests"]) == (0, []), f"{name} at {width}"
            assert found["letters"] >= 8, f"{name} at {width}: letters of {found['letters']:.1f} pixels"
    assert measured(pages["run"], 1280, tmp_path)["images"] > 0
