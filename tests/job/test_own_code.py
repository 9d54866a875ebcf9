"""What the options of a user's own class are is read from its text, as far as that says it."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.job.own_code import option_faults

# Source of the class and the options that it takes; None where only running it would tell.
OBJECTIVES: dict[str, tuple[str, list[str] | None]] = {
    "the usual constructor": ("class A(Head):\n def __init__(self, d, classes, *, grid, wanted=1): 0", ["wanted"]),
    "others by place": ("class A(Head):\n def __init__(self, f, c, grid, wanted, more=2): 0", ["wanted", "more"]),
    "by place alone": ("class A(Head):\n def __init__(self, f, c, /, *, grid, wanted=1): 0", ["wanted"]),
    "a tail of places": ("class A(Head):\n def __init__(self, *places, grid, wanted=1): 0", ["wanted"]),
    "no options": ("class A(Head):\n def __init__(self, f, c, *, grid): 0", []),
    "any options": ("class A(Head):\n def __init__(self, f, c, **options): 0", None),
    "no constructor": ("class A(Head):\n x = 1", None),
    "another base": ("class B(Head): 0\nclass A(B):\n x = 1", None),
    "a metaclass": ("class A(Head, metaclass=M):\n def __init__(self, f, c, *, grid): 0", None),
    "a wrapped constructor": ("class A(Head):\n @wrapped\n def __init__(self, f, c, *, grid): 0", None),
    "an unknown decorator": ("@register\nclass A(Head):\n wanted: int = 1", None),
    "defined twice": ("class A(Head):\n def __init__(self, f, c, *, grid): 0\nclass A(Head): 0", None),
}  # fmt: skip
MODELS: dict[str, tuple[str, list[str] | None]] = {
    "a constructor": ("class A(hff.Architecture):\n def __init__(self, width, depth=3): 0", ["width", "depth"]),
    "a dataclass": ("@dataclass\nclass A(Architecture):\n width: int\n depth: int = 3", ["width", "depth"]),
    "one with brackets": ("@dataclasses.dataclass(frozen=True)\nclass A(Architecture):\n width: int = 8", ["width"]),
    "fields of a base": ("@dataclass\nclass A(Mine):\n width: int = 8", None),
    "fields that are none": ("@dataclass\nclass A(Architecture):\n width: ClassVar[int] = 8", None),
    "fields left out": ("@dataclass\nclass A(Architecture):\n width: int = field(init=False)", None),
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "source", "known"),
    [("objective", *case) for case in OBJECTIVES.values()] + [("model", *case) for case in MODELS.values()],
    ids=[*OBJECTIVES, *MODELS],
)
def test_an_option_that_the_class_has_not_is_told_where_its_text_says_so(
    key: str, source: str, known: list[str] | None
) -> None:
    section: dict[str, Any] = {"class": "A", "file": "mine.py", "sha256": None}
    assert option_faults(key, source, "mine.py", {**section, **dict.fromkeys(known or [], 1)}) == []
    faults = option_faults(key, source, "mine.py", {**section, "wantde": 1, **dict.fromkeys(known or [], 1)})
    if known is None:
        assert faults == []
        return
    has = ", ".join(known) or "none"
    near = "; did you mean 'wanted'?" if "wanted" in known else ""
    assert faults == [(f"{key}.wantde", f"must be an option of A of mine.py (it has: {has}){near}")]
