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
from orchestrator.job.messages import Problem, known_paths, lookup, problems
from orchestrator.job.resolved import (
    INTERPRETER_LINE,
    differences,
    flatten,
    job_sha256,
    job_to_dict,
    job_yaml,
)
from orchestrator.job.schema import Data, Job, expand_digits

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

_STAND_INS: dict[Path, Any] = {
    ("kind",): "train",
    ("name",): "name",
    ("data",): "digits",
    ("data", "train"): "digits",
    ("data", "image_size"): 64,
    ("data", "expect", "train_samples"): 1797,
    ("data", "expect", "classes"): 10,
    ("data", "val", "from_train"): 0.5,
    ("model",): {"arch": "mlp", "widths": [8]},
    ("model", "arch"): "mlp",
    ("model", "widths"): [8],
    ("objective",): {"name": "ce"},
    ("objective", "name"): "ce",
    ("train",): {"epochs": 1, "global_batch_size": 64, "lr": 1.0},
    ("train", "global_batch_size"): 64,
    ("train", "lr"): 1.0,
}


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
            self.found.append((_last_line(), f"{_SET}: must be key.path=value, got {text!r}"))
            return
        path = tuple(key.split("."))
        if path not in _KNOWN_PATHS:
            near = difflib.get_close_matches(key, [".".join(p) for p in sorted(_KNOWN_PATHS)], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self.found.append((_last_line(), f"{_SET}: {key}: must be a key of a job, got {key!r}{hint}"))
            return
        value = document.read(value_text)
        for fault in value.faults:
            where = ".".join((*path, *fault.path))
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
            self._add(
                ("kind",), f"must be train in this version (search and transfer come later), got {kind!r}"
            )
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
            _drop(raw, path)
        unusable = set(broken)
        for _ in range(100):
            try:
                Job.model_validate(raw)
                return
            except ValidationError as error:
                errors = error.errors(include_url=False)
            if errors[0]["type"] == "relations":
                for relation in errors[0]["ctx"]["found"]:
                    if not _touches(unusable, relation.needs):
                        self._add(tuple(relation.key.split(".")), relation.text)
                return
            found = problems(errors, raw)
            for problem in found:
                if not _touches(unusable, [".".join(problem.path)]) and not _of_stand_in(
                    unusable, problem.path
                ):
                    self._note(problem)
            for problem in found:
                unusable.add(problem.path)
                _repair(raw, problem)

    def _note(self, problem: Problem) -> None:
        line = None
        if problem.missing and problem.path[:-1] not in self.lines and len(problem.path) > 1:
            line = self._line(problem.path[:-1])
        self._add(problem.path, problem.text, line)

    def _add(self, path: Path, text: str, line: int | None = None, *, usable: bool = False) -> None:
        if not usable:
            self.broken.add(path)
        key = ".".join(path) + ": " if path else ""
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


_KNOWN_PATHS = frozenset(known_paths())
_TAGS = (("model", "arch", ("widths", "vote")), ("objective", "name", ("label_smoothing",)))


def _last_line() -> int:
    return LARGEST_BYTES + 1


def _kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a single value"


def _within(path: Path, other: Path) -> bool:
    return path[: len(other)] == other


def _touches(unusable: set[Path], needs: Sequence[str]) -> bool:
    """Whether a relation was computed from a value that is a stand-in."""
    wanted = [tuple(need.split(".")) for need in needs]
    return any(_within(path, need) or _within(need, path) for path in unusable for need in wanted)


def _of_stand_in(unusable: set[Path], path: Path) -> bool:
    """Whether a problem may be one of the architecture or objective that stands in for an unknown one."""
    return any(
        (section, tag) in unusable and path[0] == section and path in _KNOWN_PATHS and path[1] not in common
        for section, tag, common in _TAGS
    )


def _drop(raw: Any, path: Path) -> None:
    """Take out the deepest mapping entry on the way to a path."""
    owner, last = None, None
    for key in path:
        if not isinstance(raw, dict):
            break
        if key not in raw:
            return
        owner, last, raw = raw, key, raw[key]
    if owner is not None and last is not None:
        del owner[last]


def _repair(raw: dict[str, Any], problem: Problem) -> None:
    """Make a draft more valid: leave out an unusable value, put a stand-in where one is required."""
    if not problem.missing and lookup(raw, problem.path[:1]) is not None:
        _drop(raw, problem.path)
    elif not problem.missing:
        raw.pop(problem.path[0], None)
    for path in [problem.path[:n] for n in range(len(problem.path), 0, -1)]:
        if path in _STAND_INS and lookup(raw, path) is None:
            owner = lookup(raw, path[:-1])
            if isinstance(owner, dict):
                owner[path[-1]] = copy.deepcopy(_STAND_INS[path])
                return
