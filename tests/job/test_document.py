"""YAML 1.2 core scalars, lines and refusals, the same with libyaml and with PyYAML's own parser."""

from __future__ import annotations

import random
from typing import Any

import pytest
import yaml

from orchestrator.job import document

LOADERS = [pytest.param(yaml.SafeLoader, id="python")]
if hasattr(yaml, "CSafeLoader"):
    LOADERS.append(pytest.param(yaml.CSafeLoader, id="libyaml"))


@pytest.fixture(params=LOADERS, autouse=True)
def _loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "_Loader", request.param)


# From the tag resolution table of the YAML 1.2.2 specification, section 10.3.2, and its examples.
CORE = [
    ("null", None), ("Null", None), ("NULL", None), ("~", None), ("", None), ("nUll", "nUll"),
    ("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False), ("FALSE", False),
    ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("n", "n"), ("tRue", "tRue"),
    ("0", 0), ("-19", -19), ("+12", 12), ("010", 10), ("-010", -10), ("0o7", 7), ("0o17", 15), ("0x3A", 58),
    ("0b11", "0b11"), ("1_000", "1_000"), ("-0x1", "-0x1"), ("0o8", "0o8"), ("12:30:45", "12:30:45"),
    ("0.", 0.0), ("-0.0", -0.0), (".5", 0.5), ("+12e03", 12000.0), ("-2E+05", -200000.0), ("1e-3", 0.001),
    ("1e3", 1000.0), ("1.", 1.0), ("5e-324", 5e-324), ("e3", "e3"), (".", "."), ("1e", "1e"), ("+", "+"),
    ("2001-12-14", "2001-12-14"), ("1 2", "1 2"), ("1.2.3", "1.2.3"), ("inf", "inf"), ("nan", "nan"),
    ("'1'", "1"), ('"true"', "true"), ("''", ""), ('"a\\tb"', "a\tb"), ("=", "="), ("<<", "<<"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), CORE, ids=[text or "empty" for text, _ in CORE])
def test_a_scalar_is_what_yaml_1_2_says(text: str, value: Any) -> None:
    read = document.read(f"key: {text}\n")
    assert not read.faults
    assert read.value == {"key": value}
    assert type(read.value["key"]) is type(value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".inf", "-.INF", "+.Inf", "1e400", "-1e400", "9" * 5000])
def test_a_number_that_is_not_finite_is_refused(text: str) -> None:
    read = document.read(f"a: 1\nkey: {text}\n")
    assert [(f.path, f.line) for f in read.faults] == [(("key",), 2)]
    assert read.faults[0].text.startswith("must be a finite number, got ")


def test_every_value_knows_its_line() -> None:
    read = document.read("# comment\na: 1\nb:\n  c: [x,\n    y]\n  d:\n    - e: 1\n    - 2\n")
    assert read.value == {"a": 1, "b": {"c": ["x", "y"], "d": [{"e": 1}, 2]}}
    assert read.lines == {
        (): 2,
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "c", "0"): 4,
        ("b", "c", "1"): 5,
        ("b", "d"): 6,
        ("b", "d", "0"): 7,
        ("b", "d", "0", "e"): 7,
        ("b", "d", "1"): 8,
    }


def test_of_duplicate_keys_the_first_is_kept_with_its_lines() -> None:
    read = document.read("a: {b: 1}\nc: 2\na: {b: 3, d: 4, d: 5}\n")
    assert read.value == {"a": {"b": 1}, "c": 2}
    assert read.lines == {(): 1, ("a",): 1, ("a", "b"): 1, ("c",): 2}
    assert [(f.line, f.text, f.usable) for f in read.faults] == [
        (3, "must be given once, got a duplicate of line 1", True)
    ]


def test_thirty_two_levels_are_allowed_and_one_more_is_not() -> None:
    assert not document.read("[" * 32 + "]" * 32).faults
    assert document.read("[" * 33 + "]" * 33).faults[0].text == "must be at most 32 levels deep, got more"


def test_a_tab_in_a_comment_is_no_problem() -> None:
    assert document.read("#\ta\nb: 1 #\tc\n").value == {"b": 1}


def _random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(9 if depth else 6)
    if kind >= 6:
        size = rng.randrange(4)
        if kind == 6:
            return [_random_value(rng, depth - 1) for _ in range(size)]
        return {f"k{rng.randrange(99)}": _random_value(rng, depth - 1) for _ in range(size)}
    words = ["no", "1e-3", "010", "a: b", "# x", "", "~", "ünï", "'", '"', "-", "[", "line\nbreak", " x "]
    return [
        None,
        True,
        rng.randrange(-99, 99),
        rng.uniform(-1e9, 1e9),
        rng.choice(words),
        f"w{rng.random()}",
    ][kind]


def test_what_json_writes_is_read_back_as_the_same_values() -> None:
    """JSON is the independent reference: YAML 1.2 contains it."""
    import json

    rng = random.Random(5)
    for _ in range(300):
        value = {"top": _random_value(rng, 4)}
        read = document.read(json.dumps(value, indent=rng.choice([None, 2])))
        assert not read.faults
        assert read.value == value


def test_no_damaged_text_is_anything_but_a_value_or_a_fault() -> None:
    """Cut, doubled and replaced pieces of a job never raise and are never accepted without a document."""
    rng = random.Random(7)
    good = "a: {b: [1, 2], c: 'x'}\nd:\n  - e: \"f\"\n  - g: |\n      text\nh: &i 1e-3 # j\nk: !l m\n"
    pieces = [
        "[",
        "]",
        "{",
        "}",
        ": ",
        "- ",
        "'",
        '"',
        "\n",
        "\t",
        "&",
        "*",
        "!",
        "|",
        "%",
        "@",
        "---\n",
        "\x00",
        "é",
    ]
    for _ in range(1500):
        start, end = sorted(rng.randrange(len(good) + 1) for _ in range(2))
        text = good[:start] + rng.choice(pieces) + good[end:]
        read = document.read(text)
        lines = text.count("\n") + 1
        assert all(1 <= fault.line <= lines for fault in read.faults), text
