"""How a value of a job is written in a message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from orchestrator.job.paths import redacted

_LONGEST = 60
_WORD = re.compile(r"[\w<>-]{1,60}", re.ASCII)


def show(value: Any) -> str:
    """A value as YAML would have it, on one line, not too long; passwords in URLs are left out."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = repr(redacted(value))
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]}...{text[0]}"
    if isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(v) for v in value) + "]"
        return text if len(text) <= _LONGEST else f"a list of {len(value)}"
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
        return text if len(text) <= _LONGEST else f"a mapping of {len(value)} keys"
    text = repr(value) if isinstance(value, float) else _whole(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def counted(number: int, thing: str) -> str:
    """A number of things: `1 shard`, `2 shards`, `2 epochs`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def dotted(path: Sequence[str]) -> str:
    """A key path as `a.b.c`; a key that is no word is quoted."""
    return ".".join(key if _WORD.fullmatch(key) else show(key) for key in path)


def _whole(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**100:
        return "a number of more than 100 digits"
    return str(value)
