"""YAML text -> plain values with the line of each, closing YAML's traps.

Scalars follow the YAML 1.2 core schema (1e-3 is a number, `no` is text, 010 is ten). Duplicate keys,
anchors, aliases, tags, several documents and depth beyond 32 levels are problems, not features. The
parser's events are walked without recursion, so that no file can exhaust the stack.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str, ...]
DEEPEST = 32
_LONGEST_NUMBER = 400
_TOO_DEEP = f"must be at most {DEEPEST} levels deep, got more"

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Fault:
    """What is wrong at a line (from 1) and a key path, without the file's name.

    The value at the path can be `usable` all the same: of duplicates, the first one is kept.
    """

    path: Path
    line: int
    text: str
    usable: bool = False


@dataclass
class Document:
    """The values of a text, the line of each, and what could not be read; faulty values are None."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


class NotFinite(ValueError):
    """A number that is NaN, infinite or too long."""


def scalar(text: str) -> Any:
    """The value of an unquoted scalar in the YAML 1.2 core schema. Raises NotFinite."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _NOT_FINITE.fullmatch(text) or (len(text) > _LONGEST_NUMBER and _FLOAT.fullmatch(text)):
        raise NotFinite(text)
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise NotFinite(text)
        return number
    return text


def read(text: str) -> Document:
    """Read the one document of a text."""
    document = Document()
    forbidden = _forbidden_character(text)
    if forbidden is not None:
        document.faults.append(forbidden)
        return document
    builder = _Builder(document)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if not builder.take(event):
                break
    except yaml.YAMLError as error:
        document.faults.append(_syntax_fault(error, text, builder))
    return document


@dataclass
class _Open:
    """A mapping or list that has not ended yet."""

    value: dict[str, Any] | list[Any]
    path: Path
    line: int
    key: str | None = None
    skip: bool = False
    flow: bool = False


class _Builder:
    """Turns parser events into values; `take` is False when reading on makes no sense."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.open: list[_Open] = []
        self.documents = 0

    def take(self, event: Any) -> bool:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                self._fault((), line, "must be one document, got a second one")
                return False
        elif isinstance(event, yaml.AliasEvent):
            if self._wants_key():
                self._fault((), line, f"must have words as keys, got the alias *{event.anchor}")
                return False
            path = self._place(line, event)
            self._fault(path, line, f"must be written out (no aliases), got the alias *{event.anchor}")
            self._put(None, path)
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event, line)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            return self._start(event, line)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            closed = self.open.pop()
            self._put(closed.value, closed.path)
        return True

    def _scalar(self, event: Any, line: int) -> None:
        if self._wants_key():
            self._key(event, line)
            return
        path = self._place(line, event)
        self._refuse_properties(event, path, line)
        value: Any = None
        if not event.style and event.implicit[0]:
            try:
                value = scalar(event.value)
            except NotFinite as error:
                self._fault(path, line, f"must be a finite number, got {str(error)[:60]}")
        else:
            value = event.value
        self._put(value, path)

    def _start(self, event: Any, line: int) -> bool:
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        if self._wants_key():
            self._fault((), line, "must have words as keys, got a list or a mapping as a key")
            return False
        path = self._place(line, event)
        self._refuse_properties(event, path, line)
        if len(self.open) == DEEPEST:
            self._fault((), line, _TOO_DEEP)
            return False
        self.open.append(_Open({} if is_mapping else [], path, line, flow=event.flow_style is True))
        return True

    def _wants_key(self) -> bool:
        return bool(self.open) and isinstance(self.open[-1].value, dict) and self.open[-1].key is None

    def _key(self, event: Any, line: int) -> None:
        top = self.open[-1]
        assert isinstance(top.value, dict)
        path = (*top.path, event.value)
        self._refuse_properties(event, path, line)
        top.key = event.value
        top.skip = event.value in top.value
        if any(part.skip for part in self.open[:-1]):
            top.value[event.value] = None
        elif top.skip:
            first = self.document.lines[path]
            text = f"must be given once, got a duplicate of line {first}"
            self.document.faults.append(Fault(path, line, text, usable=True))
        else:
            top.value[event.value] = None
            self._line(path, line)

    def _place(self, line: int, event: Any) -> Path:
        """The key path of the value that begins here; a list item's line is noted."""
        if not self.open:
            self._line((), line)
            return ()
        top = self.open[-1]
        if isinstance(top.value, dict):
            assert top.key is not None
            return (*top.path, top.key)
        path = (*top.path, str(len(top.value)))
        self._line(path, line)
        return path

    def _line(self, path: Path, line: int) -> None:
        if not any(part.skip for part in self.open):
            self.document.lines[path] = line

    def _put(self, value: Any, path: Path) -> None:
        if not self.open:
            self.document.value = value
            return
        top = self.open[-1]
        if isinstance(top.value, list):
            top.value.append(value)
            return
        if not top.skip and top.key is not None:
            top.value[top.key] = value
        top.key, top.skip = None, False

    def _refuse_properties(self, event: Any, path: Path, line: int) -> None:
        if event.anchor is not None:
            self._fault(path, line, f"must be written out (no anchors), got the anchor &{event.anchor}")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._fault(path, line, f"must be a plain value (no tags), got the tag {tag}")

    def _fault(self, path: Path, line: int, text: str) -> None:
        self.document.faults.append(Fault(path, line, text))


def _forbidden_character(text: str) -> Fault | None:
    """Tabs (outside comments) and control characters: the two parsers do not agree on them."""
    for number, row in enumerate(text.split("\n"), start=1):
        if "\t" in row.split("#", 1)[0]:
            return Fault((), number, "must be spaced and indented with spaces, got a tab")
        for character in row.removesuffix("\r"):
            if ord(character) < 32 and character != "\t":
                return Fault((), number, f"must be without control characters, got {character!r}")
    return None


def _syntax_fault(error: yaml.YAMLError, text: str, builder: _Builder) -> Fault:
    """One form for the different messages of two parsers (libyaml and PyYAML's own)."""
    if isinstance(error, yaml.reader.ReaderError):
        position = error.position if isinstance(error.position, int) else 0
        return Fault((), text[:position].count("\n") + 1, "must be without control characters, got one")
    mark = getattr(error, "problem_mark", None)
    context = str(getattr(error, "context", "") or "")
    context_mark = getattr(error, "context_mark", None)
    line = min((mark.line if mark else 0) + 1, len(text.rstrip().split("\n")))
    if "nesting depth" in f"{context} {getattr(error, 'problem', '')}":
        return Fault((), line, _TOO_DEEP)
    if "quoted" in context and context_mark is not None:
        return Fault((), context_mark.line + 1, f"must close the quote, got no end up to line {line}")
    flow = [part for part in builder.open if part.flow]
    if "flow" in context and flow:
        bracket = "[" if isinstance(flow[-1].value, list) else "{"
        return Fault((), flow[-1].line, f"must close the bracket {bracket!r}, got no end up to line {line}")
    return Fault((), line, f"must be YAML, got {text.split(chr(10))[line - 1].strip()[:60]!r}")
