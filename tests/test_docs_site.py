"""The documentation as a site, and the questions that it answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

DOCS = ROOT / "docs"


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [page for value in values for page in pages(value)]


def test_every_page_has_its_place_in_the_site() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(nav)) == sorted(page.name for page in DOCS.glob("*.md"))


def build(config_file: Path, out: Path) -> None:
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    build_site(load_config(str(config_file), site_dir=str(out)))


@pytest.mark.filterwarnings("ignore")
def test_the_site_builds_with_every_link_in_it(tmp_path: Path) -> None:
    build(ROOT / "mkdocs.yml", tmp_path / "site")
    made = {page.name for page in (tmp_path / "site").glob("*.html")}
    assert {page.with_suffix(".html").name for page in DOCS.glob("*.md")} <= made
    assert "train.global_batch_size" in (tmp_path / "site/job-reference.html").read_text()
    first = (tmp_path / "site/index.html").read_text()
    assert "make quickstart" in first and '<a href="job-reference.html">' in first, "the README, and the list of pages"
    assert not list((tmp_path / "site").rglob("*.py"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("link", ["[x](nowhere.md)", "[x](data.md#no-such-part)"])
def test_a_broken_link_breaks_the_site(link: str, tmp_path: Path) -> None:
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    for page in DOCS.glob("*.md"):
        (tmp_path / "docs" / page.name).write_text(page.read_text() + (link if page.name == "index.md" else ""))
    (tmp_path / "docs/images").symlink_to(DOCS / "images")
    (tmp_path / "docs/first_page.py").symlink_to(DOCS / "first_page.py")
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    with pytest.raises(Abort):
        build(tmp_path / "mkdocs.yml", tmp_path / "site")


def messages() -> list[str]:
    """The words of error messages that stand in the headings of the page of questions."""
    headings = re.findall(r"^### (.*)$", (DOCS / "faq.md").read_text(), re.MULTILINE)
    return [words for heading in headings for words in re.findall(r"`([^`]+)`", heading)]


@pytest.mark.parametrize("words", messages())
def test_a_message_that_is_explained_is_one_that_the_program_gives(words: str) -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "orchestrator").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    assert words in joined or words in re.sub(r"[\"']", "", joined)


def test_the_page_of_questions_explains_messages() -> None:
    assert len(messages()) > 20
