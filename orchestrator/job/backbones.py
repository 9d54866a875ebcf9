"""Which backbones timm has: read from its source, so that a job is checked without importing it (or torch)."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from pathlib import Path

_REGISTERED = re.compile(r"^@register_model\s+def\s+(\w+)\s*\(", re.MULTILINE)
_TAGGED = re.compile(r"""^\s*['"](\w+)\.([\w-]+)['"]\s*:""", re.MULTILINE)
_HUB_PREFIXES = ("hf_hub:", "hf-hub:", "local-dir:", "timm/")


@functools.cache
def _sources() -> tuple[str, ...]:
    found = importlib.util.find_spec("timm")
    if found is None or found.submodule_search_locations is None:
        return ()
    folder = Path(found.submodule_search_locations[0]) / "models"
    return tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))


@functools.cache
def names() -> frozenset[str]:
    """Every backbone that timm can build, without the tags of weights."""
    return frozenset(name for text in _sources() for name in _REGISTERED.findall(text))


@functools.cache
def tags() -> dict[str, frozenset[str]]:
    """The tags of published weights by backbone: resnet50 -> a1_in1k, ..."""
    found: dict[str, set[str]] = {}
    for text in _sources():
        for name, tag in _TAGGED.findall(text):
            found.setdefault(name, set()).add(tag)
    return {name: frozenset(of) for name, of in found.items()}


def fault(backbone: str) -> str | None:
    """What is wrong with the name of a backbone, None when timm can build it."""
    if backbone.startswith(_HUB_PREFIXES):
        return f"must be a name that timm has (weights from elsewhere: model.pretrained: FILE), got {backbone!r}"
    known = names()
    name, dot, tag = backbone.partition(".")
    if not known:
        return f"must be a timm model, got {backbone!r}, and timm is not installed here"
    if name not in known:
        return f"must be a timm model, got {backbone!r}; closest: {', '.join(_closest(name, known))}"
    with_tags = tags().get(name, frozenset())
    # A few families make their tags while they are imported: those are judged when the backbone is built.
    if dot and with_tags and tag not in with_tags:
        closest = ", ".join(f"{name}.{t}" for t in _closest(tag, with_tags))
        return f"must be a timm model with weights of that tag, got {backbone!r}; closest: {closest}"
    return None


def _closest(text: str, known: frozenset[str]) -> list[str]:
    return difflib.get_close_matches(text, sorted(known), n=3, cutoff=0.0)
