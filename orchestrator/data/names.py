"""What the samples of a packed set were called in their source: a text beside the index, which nothing depends on."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from orchestrator.data.index import Index

FILE = "names.txt"


def write_names(folder: Path, names: Iterable[tuple[str, str]]) -> None:
    """Write (key, path in the source) of all samples, a line each."""
    with open(folder / FILE, "w", encoding="utf-8", errors="replace") as file:
        for key, name in names:
            one_line = name.replace("\n", " ")
            file.write(f"{key} {one_line}\n")


def source_names(index: Index, keys: Collection[str]) -> dict[str, str]:
    """Path in the source by key, as far as it is known: not of shards that others wrote, nor behind a URL."""
    found: dict[str, str] = {}
    wanted = set(keys)
    if not wanted:
        return found
    try:
        with open(index.folder / FILE, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, name = line.rstrip("\n").partition(" ")
                if key in wanted:
                    found[key] = name
    except OSError:
        return {}
    return found
