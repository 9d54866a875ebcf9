"""A job that is not yet known to be valid: overridden, checked, and all its problems told at once."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import JobError
from orchestrator.job import document, space
from orchestrator.job.document import Path
from orchestrator.job.hints import near_path
from orchestrator.job.messages import Problem, lookup, problems
from orchestrator.job.repair import KINDS, KNOWN_PATHS, STAND_INS, drop, kind_of, mend, of_stand_in, touches
from orchestrator.job.resolved import job_to_dict
from orchestrator.job.schema import Job, expand_digits
from orchestrator.job.search import SearchJob
from orchestrator.job.show import dotted, show

_SET = "--set"
_BASE = ("base",)
# Sections that may name a class in a file of the user's, and the key that then says so.
_OWN_CODE = (("objective", "name"), ("model", "arch"))


class Draft:
    """The values of a job that is not yet known to be valid, with the line of each and all problems.

    `place` begins every message; `within` is where these values lie in a larger file.
    """

    def __init__(self, place: str, read: document.Document, *, within: Path = (), lines_shown: bool = True) -> None:
        self.place, self.within, self.lines_shown = place, within, lines_shown
        self.lines = read.lines
        self.set_paths: set[Path] = set()
        self.broken: set[Path] = set()
        self.found: list[tuple[int, str]] = []
        self.base_overrides: list[str] = []
        for fault in read.faults:
            self._add(fault.path, fault.text, fault.line, usable=fault.usable)
        if () in self.broken:
            raise self._error()
        if not isinstance(read.value, dict):
            got = "an empty file" if read.value is None else _kind_of(read.value)
            self._add((), f"must be a mapping of keys (kind, name, data, ...), got {got}")
            raise self._error()
        self.raw: dict[str, Any] = read.value
        self._expand()

    @property
    def kind(self) -> str:
        return kind_of(self.raw)

    def _expand(self) -> None:
        # A backbone's data section fills in the shorthand by itself, in its own size.
        if "data" in self.raw and self.kind == "train":
            self.raw["data"] = expand_digits(self.raw["data"])
        for section, tag in _OWN_CODE:
            given = self.raw.get(section)
            if isinstance(given, dict) and "file" in given:
                self.raw[section] = {tag: "own"} | given

    def override(self, text: str) -> None:
        """Apply one `key.path=value`."""
        key, equals, value_text = text.partition("=")
        key = key.strip()
        if not equals or not key:
            self.found.append((_last_line(), f"{_SET}: must be key.path=value, got {show(text)}"))
            return
        path = tuple(key.split("."))
        if self.kind == "search" and path[:1] == _BASE and len(path) > 1:
            self.base_overrides.append(f"{key.partition('.')[2]}={value_text}")
            self.set_paths.add(path)
            return
        known = KNOWN_PATHS[self.kind]
        if path not in known and not self._own_option(path):
            of_base = {(*_BASE, *p) for p in KNOWN_PATHS["train"]} if self.kind == "search" else set()
            text = f"must be a key of a job, got {show(key)}{near_path(path, known | of_base)}"
            self.found.append((_last_line(), f"{_SET}: {dotted(path)}: {text}"))
            return
        value = document.read(value_text)
        for fault in value.faults:
            where = dotted((*path, *fault.path))
            self.found.append((_last_line(), f"{_SET}: {where}: {fault.text}"))
        self.broken = {p for p in self.broken if p[: len(path)] != path}
        if value.faults:
            self.broken.add(path)
        self._put(path, value.value)
        self._expand()

    def locate(self, key: str) -> str:
        """How messages name a key: `jobs/x.yaml:14: train.lr`, or `--set: train.lr`."""
        path = tuple(key.split("."))
        return f"{_SET}: {key}" if self._from_set(path) else f"{self.place}:{self._line(path)}: {key}"

    def is_set(self, key: str) -> bool:
        """Whether `--set` gave the value of a key, or of a section around it."""
        return self._from_set(tuple(key.split(".")))

    def _own_option(self, path: Path) -> bool:
        """Whether a path may be an option of the user's own class: it knows them, not the schema."""
        section = self.raw.get(path[0])
        return path[0] in dict(_OWN_CODE) and len(path) == 2 and isinstance(section, dict) and "file" in section

    def _put(self, path: Path, value: Any) -> None:
        section = self.raw
        for key in path[:-1]:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[path[-1]] = value
        self.set_paths.add(path)

    def job(self) -> Job:
        """The valid job of one run. Raises JobError with all problems."""
        job = self._valid()
        if not isinstance(job, Job):
            self._add(("kind",), f"must be train or transfer here, got {show(self.raw.get('kind'))}")
            raise self._error()
        return job

    def fault(self, key: str, text: str) -> JobError:
        """The error of a job whose values are fine, for what they name is not; `key` is dotted."""
        self._add(tuple(key.split(".")), text)
        return self._error()

    def search(self, load: Callable[[str, list[str]], Job], resolve: Callable[[Job, Draft], Job]) -> SearchJob:
        """The valid search; `load` reads its base from a file, `resolve` makes an inline base's paths absolute.

        Raises JobError with all problems.
        """
        given = self.raw.get("base")
        if isinstance(given, str):
            try:
                self.raw["base"] = job_to_dict(load(given, self.base_overrides))
            except JobError as error:
                self._add(_BASE, f"must be a job that is valid, got {show(given)}:")
                self.found += [(self._line(_BASE), f"  {line}") for line in str(error).splitlines()]
        elif isinstance(given, dict):
            self._inline_base(given, resolve)
        job = self._valid()
        assert isinstance(job, SearchJob)
        self._refuse_values(job)
        return job

    def _refuse_values(self, search: SearchJob) -> None:
        """Raise JobError when the base job would not be valid with a value of the space."""
        for path, domain in search.domains.items():
            for value in space.extremes(domain):
                values = space.with_values(search.base, {path: value})
                try:
                    Draft("base", document.Document(values), lines_shown=False).job()
                except JobError as error:
                    self._add(
                        ("space", *path.split(".")), f"{show(value)} makes no valid job: {str(error).splitlines()[0]}"
                    )
                    break
        if self.found:
            raise self._error()

    def _inline_base(self, given: dict[str, Any], resolve: Callable[[Job, Draft], Job]) -> None:
        lines = {path[1:]: line for path, line in self.lines.items() if path[:1] == _BASE}
        # What trials are called and where they lie is the search's affair.
        given = {"kind": "train", "name": "trial"} | given
        try:
            draft = Draft(self.place, document.Document(given, lines), within=(*self.within, *_BASE))
            for override in self.base_overrides:
                draft.override(override)
            self.raw["base"] = job_to_dict(resolve(draft.job(), draft))
        except JobError as error:
            self.broken.add(_BASE)
            self.found += [(self._line(_BASE), line) for line in str(error).splitlines()]

    def _valid(self) -> Any:
        root = KINDS[self.kind]
        if self.raw.get("kind") not in KINDS:
            self._kind_problem()
        if self.found:
            self._inspect(copy.deepcopy(self.raw), frozenset(self.broken))
            raise self._error()
        try:
            return root.model_validate(self.raw)
        except ValidationError:
            self._inspect(copy.deepcopy(self.raw), frozenset())
            raise self._error() from None

    def _kind_problem(self) -> None:
        kinds, given = list(KINDS), self.raw.get("kind")
        choice = f"one of {', '.join(kinds)}"
        if "kind" not in self.raw:
            if ("kind",) not in self.broken:
                self._add(("kind",), f"must be given ({choice}), got nothing")
            return
        near = difflib.get_close_matches(given, kinds, n=1) if isinstance(given, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if ("kind",) not in self.broken:
            self._add(("kind",), f"must be {choice}, got {show(given)}{hint}")

    def _inspect(self, raw: dict[str, Any], broken: frozenset[Path]) -> None:
        """Note every problem; where a value is unusable, a stand-in lets the others be checked."""
        kind = self.kind
        root, stand_ins = KINDS[kind], STAND_INS[kind]
        for path in broken:
            drop(raw, path)
        unusable = set(broken)
        for _ in range(100):
            try:
                root.model_validate(raw)
                return
            except ValidationError as error:
                errors = error.errors(include_url=False)
            if errors[0]["type"] == "relations":
                for relation in errors[0]["ctx"]["found"]:
                    if not touches(unusable, relation.needs):
                        self._add(tuple(relation.key.split(".")), relation.text)
                return
            found = problems(errors, raw, root)
            # That what a mistyped key stands for is not there is the same mistake once more.
            unusable |= {p.meant for p in found if p.meant is not None and lookup(raw, p.meant) is None}
            for problem in found:
                if not touches(unusable, [".".join(problem.path)]) and not of_stand_in(unusable, problem.path):
                    self._note(problem)
            for problem in found:
                unusable.add(problem.path)
                mend(raw, problem, stand_ins)

    def _note(self, problem: Problem) -> None:
        line = None
        if problem.missing and problem.path[:-1] not in self.lines and len(problem.path) > 1:
            line = self._line(problem.path[:-1])
        self._add(problem.path, problem.text, line)

    def _add(self, path: Path, text: str, line: int | None = None, *, usable: bool = False) -> None:
        if not usable:
            self.broken.add(path)
        whole = (*self.within, *path)
        key = dotted(whole) + ": " if whole else ""
        if self._from_set(path):
            self.found.append((_last_line(), f"{_SET}: {key}{text}"))
            return
        line = self._line(path) if line is None else line
        number = f":{line}" if self.lines_shown else ""
        self.found.append((line, f"{self.place}{number}: {key}{text}"))

    def _from_set(self, path: Path) -> bool:
        return any(path[: len(p)] == p for p in self.set_paths)

    def _line(self, path: Path) -> int:
        # A path of a space is one key with dots in it.
        by_name = {".".join(known): line for known, line in self.lines.items()}
        while path and ".".join(path) not in by_name:
            path = path[:-1]
        return by_name.get(".".join(path), 1)

    def _error(self) -> JobError:
        lines = [text for _, text in sorted(self.found, key=lambda entry: entry[0])]
        return JobError("\n".join(dict.fromkeys(lines)))


def _last_line() -> int:
    return 2**31


def _kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a single value"
