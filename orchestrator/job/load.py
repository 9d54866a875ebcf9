"""From a job file and `--set` to a valid `Job` with absolute paths, or to all its problems at once."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import JobError
from orchestrator.job import document, paths
from orchestrator.job.document import Path
from orchestrator.job.messages import Problem, problems
from orchestrator.job.repair import KNOWN_PATHS, drop, mend, of_stand_in, touches
from orchestrator.job.resolved import (
    INTERPRETER_LINE,
    differences,
    flatten,
    job_sha256,
    job_to_dict,
    job_yaml,
)
from orchestrator.job.schema import Data, Job, expand_digits
from orchestrator.job.show import dotted, show

__all__ = [
    "INTERPRETER_LINE",
    "Job",
    "differences",
    "flatten",
    "job_sha256",
    "job_to_dict",
    "job_yaml",
    "load_job",
    "resolve_runs",
]

LARGEST_BYTES = 2**20
_SET = "--set"
_LATER_KINDS = ("search", "transfer")


def load_job(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> Job:
    """Read, override, validate and resolve a job file.

    `overrides` are `key.path=value` with values in YAML; `tell` gets a line for the user when `runs` is not
    where the job says. Raises JobError with every problem, one a line, sorted by line.
    """
    name = os.fspath(path)
    draft = _Draft(name, document.read(_read_text(name)))
    for override in overrides:
        draft.override(override)
    return _resolve(name, draft.job(), tell)


def resolve_runs(job_path: str | os.PathLike[str], job: Job) -> str:
    """The absolute folder of the runs of a job that was read from `job_path`."""
    return paths.runs_folder(os.fspath(job_path), job.runs)[0]


def _resolve(name: str, job: Job, tell: Callable[[str], None]) -> Job:
    base = paths.base_folder(name)
    runs, line = paths.runs_folder(name, job.runs)
    if line is not None:
        tell(line)
    data: Data = job.data.model_copy(
        update={
            key: paths.absolute_location(place, base)
            for key in ("train", "val", "test")
            if isinstance(place := getattr(job.data, key), str)
        }
    )
    update: dict[str, Any] = {"runs": runs, "data": data}
    if job.tracking.uri is not None:
        uri = paths.absolute_tracking(job.tracking.uri, base)
        update["tracking"] = job.tracking.model_copy(update={"uri": uri})
    return job.model_copy(update=update)


def _read_text(name: str) -> str:
    """The text of a job file. Raises JobError when it is none."""
    if os.path.isdir(name):
        raise JobError(f"{name}: must be a job file, got a directory{_jobs_near(name)}")
    try:
        with open(name, "rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise JobError(f"{name}: must be a job file, got no such file{_jobs_near(name)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise JobError(f"{name}: must be a readable file, got: {reason}") from None
    if len(content) > LARGEST_BYTES:
        raise JobError(f"{name}: must be at most 1 MiB, got more")
    if b"\0" in content:
        raise JobError(f"{name}: must be a text file, got a binary file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise JobError(f"{name}:{line}: must be UTF-8 text, got the byte 0x{byte:02x}") from None


def _jobs_near(name: str) -> str:
    """What job files there are: beside the missing one, or in jobs/."""
    beside = FilePath(name) if os.path.isdir(name) else FilePath(name).parent
    for folder in (beside, FilePath("jobs")):
        try:
            found = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
        except OSError:
            continue
        if found:
            near = difflib.get_close_matches(FilePath(name).name, found, n=1, cutoff=0.7)
            hint = f"; did you mean {folder / near[0]}?" if near else ""
            return f"{hint} ({folder}/ has: {', '.join(found)})"
    return ""


class _Draft:
    """The values of a job that is not yet known to be valid, with the line of each and all problems."""

    def __init__(self, name: str, read: document.Document) -> None:
        self.name = name
        self.lines = read.lines
        self.set_paths: set[Path] = set()
        self.broken: set[Path] = set()
        self.found: list[tuple[int, str]] = []
        for fault in read.faults:
            self._add(fault.path, fault.text, fault.line, usable=fault.usable)
        if () in self.broken:
            raise self._error()
        if not isinstance(read.value, dict):
            got = "an empty file" if read.value is None else _kind_of(read.value)
            self._add((), f"must be a mapping of keys (kind, name, data, ...), got {got}")
            raise self._error()
        self.raw: dict[str, Any] = read.value
        self.raw |= {"data": expand_digits(self.raw["data"])} if "data" in self.raw else {}

    def override(self, text: str) -> None:
        """Apply one `key.path=value`."""
        key, equals, value_text = text.partition("=")
        key = key.strip()
        if not equals or not key:
            self.found.append((_last_line(), f"{_SET}: must be key.path=value, got {show(text)}"))
            return
        path = tuple(key.split("."))
        if path not in KNOWN_PATHS:
            near = difflib.get_close_matches(key, [".".join(p) for p in sorted(KNOWN_PATHS)], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self.found.append((_last_line(), f"{_SET}: {dotted(path)}: must be a key of a job, got {show(key)}{hint}"))
            return
        value = document.read(value_text)
        for fault in value.faults:
            where = dotted((*path, *fault.path))
            self.found.append((_last_line(), f"{_SET}: {where}: {fault.text}"))
        self.broken = {p for p in self.broken if p[: len(path)] != path}
        if value.faults:
            self.broken.add(path)
        self._put(path, expand_digits(value.value) if path == ("data",) else value.value)

    def _put(self, path: Path, value: Any) -> None:
        section = self.raw
        for key in path[:-1]:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[path[-1]] = value
        self.set_paths.add(path)

    def job(self) -> Job:
        """The valid job. Raises JobError with all problems."""
        kind = self.raw.get("kind")
        if kind in _LATER_KINDS:
            self.found.clear()
            self._add(("kind",), f"must be train in this version (search and transfer come later), got {kind!r}")
            raise self._error()
        if self.found:
            self._inspect(copy.deepcopy(self.raw), frozenset(self.broken))
            raise self._error()
        try:
            return Job.model_validate(self.raw)
        except ValidationError:
            self._inspect(copy.deepcopy(self.raw), frozenset())
            raise self._error() from None

    def _inspect(self, raw: dict[str, Any], broken: frozenset[Path]) -> None:
        """Note every problem; where a value is unusable, a stand-in lets the others be checked."""
        for path in broken:
            drop(raw, path)
        unusable = set(broken)
        for _ in range(100):
            try:
                Job.model_validate(raw)
                return
            except ValidationError as error:
                errors = error.errors(include_url=False)
            if errors[0]["type"] == "relations":
                for relation in errors[0]["ctx"]["found"]:
                    if not touches(unusable, relation.needs):
                        self._add(tuple(relation.key.split(".")), relation.text)
                return
            found = problems(errors, raw)
            for problem in found:
                if not touches(unusable, [".".join(problem.path)]) and not of_stand_in(unusable, problem.path):
                    self._note(problem)
            for problem in found:
                unusable.add(problem.path)
                mend(raw, problem)

    def _note(self, problem: Problem) -> None:
        line = None
        if problem.missing and problem.path[:-1] not in self.lines and len(problem.path) > 1:
            line = self._line(problem.path[:-1])
        self._add(problem.path, problem.text, line)

    def _add(self, path: Path, text: str, line: int | None = None, *, usable: bool = False) -> None:
        if not usable:
            self.broken.add(path)
        key = dotted(path) + ": " if path else ""
        if self._from_set(path):
            self.found.append((_last_line(), f"{_SET}: {key}{text}"))
            return
        line = self._line(path) if line is None else line
        self.found.append((line, f"{self.name}:{line}: {key}{text}"))

    def _from_set(self, path: Path) -> bool:
        return any(path[: len(p)] == p for p in self.set_paths)

    def _line(self, path: Path) -> int:
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def _error(self) -> JobError:
        lines = [text for _, text in sorted(self.found, key=lambda entry: entry[0])]
        return JobError("\n".join(dict.fromkeys(lines)))


def _last_line() -> int:
    return LARGEST_BYTES + 1


def _kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a single value"
