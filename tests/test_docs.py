"""What the documentation points at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "infra").rglob("*.md")])
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_FILE = re.compile(r"`((?:tests|jobs|docs|benchmarks|infra|hff|orchestrator)/(?:[\w.-]+/)*\w[\w-]*\.\w+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_repository_and_every_file_named_exists(page: Path) -> None:
    text = page.read_text()
    links = [link for link in _LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in _FILE.findall(text) if not (ROOT / name).exists()]
    assert missing == []


def test_the_table_of_faults_names_tests() -> None:
    named = _FILE.findall((ROOT / "docs" / "reliability.md").read_text())
    assert len(set(named)) > 15
