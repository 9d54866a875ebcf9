"""The pages in a real browser, at the width of a desk and of a phone: all in view, all loaded, all to be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.show.pages import html
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


def test_a_wide_table_scrolls_in_its_own_box_and_the_page_does_not(tmp_path: Path) -> None:
    head = tuple(f"a-column-of-some-width-{i}" for i in range(12))
    table = html.table(head, [tuple(f"a value of column {i}" for i in range(12))] * 3)
    long = html.table(("key", "value"), [("data.train", "/very/long/folder" * 20), ("x" * 150, "1")])
    body = [
        "<h1>" + "a-run-with-a-long-name-" * 6 + "</h1>",
        html.numbers({"status": "failed at step 12345678/98765432", "weights": "ab" * 32, "val top-1": "91.00 %"}),
        f"<p>It failed: {'/a/path/without/a/space' * 9}</p>",
        html.card("in a card", table),
        f'<div class="grid">{html.card("in a grid", table)}{html.card("long words", long)}</div>',
        html.sheet([(None, ("is a", "n01440764/" + "n01440764_10026" * 4 + ".JPEG"))] * 3),
    ]
    page = tmp_path / "wide.html"
    page.write_text(html.page("wide", body))
    shown = Path(os.environ.get("ORCHESTRATOR_PICTURES", tmp_path))
    for width in WIDTHS:
        picture(page, width, shown / f"wide-{width}.png", scratch=tmp_path)
        found = measured(page, width, tmp_path)
        assert (found["overflow"], found["outside"]) == (0, []), f"at {width}"
        assert found["boxes"] == 3
