"""A hook of mkdocs: the first page of the site is the README, and then the list of all pages that index.md has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The text of a page; that of index.md with the README before it, whose links begin where the pages lie."""
    if page.file.src_uri != "index.md":
        return markdown
    readme = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", readme)
    # What is no part of the site is named without a link.
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!\w+://)[^)#]*/[^)]*\)", r"\1", text)
    table = markdown.partition("\n\n")[2]
    return f"{text}\n## All pages\n\n{table}"
