"""From a job file and `--set` to a valid `Job` with absolute paths, or to all its problems at once."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any, TypeVar

from orchestrator.errors import JobError, KeyedError
from orchestrator.job import document, own_code, paths
from orchestrator.job.draft import Draft
from orchestrator.job.models import BackboneModel, FileModel
from orchestrator.job.objectives import OwnObjective
from orchestrator.job.resolved import (
    INTERPRETER_LINE,
    differences,
    flatten,
    job_sha256,
    job_to_dict,
    job_yaml,
)
from orchestrator.job.schema import Job
from orchestrator.job.search import SearchJob

__all__ = [
    "INTERPRETER_LINE",
    "Job",
    "SearchJob",
    "differences",
    "flatten",
    "job_from_values",
    "job_sha256",
    "job_to_dict",
    "job_yaml",
    "load_any",
    "load_job",
    "locate",
    "placed",
    "resolve_runs",
]

LARGEST_BYTES = 2**20
_Own = TypeVar("_Own", OwnObjective, FileModel)


def load_any(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> Job | SearchJob:
    """Read, override, validate and resolve a job file of any kind.

    `overrides` are `key.path=value` with values in YAML; `tell` gets a line for the user when `runs` is not
    where the job says. Raises JobError with every problem, one a line, sorted by line.
    """
    name = os.fspath(path)
    draft = Draft(name, document.read(_read_text(name)))
    for override in overrides:
        draft.override(override)
    if draft.kind == "search":
        base = paths.base_folder(name)
        search = draft.search(
            lambda given, more: load_job(paths.absolute(given, base), more),
            lambda job, inner: _resolve(name, job, lambda line: None, inner),
        )
        return search.model_copy(update=_resolved_places(name, search, tell))
    return _resolve(name, draft.job(), tell, draft)


def load_job(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> Job:
    """`load_any` where a job of one run is wanted. Raises JobError for a search, too."""
    job = load_any(path, overrides, tell=tell)
    if isinstance(job, SearchJob):
        raise JobError(f"{os.fspath(path)}: kind: must be train or transfer here, got 'search'")
    return job


def locate(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Callable[[str], str]:
    """What names the keys of a job that was loaded from these: `jobs/x.yaml:14: train.lr`, or `--set: train.lr`."""
    name = os.fspath(path)
    draft = Draft(name, document.read(_read_text(name)))
    for override in overrides:
        draft.override(override)
    return draft.locate


@contextmanager
def placed(path: str | os.PathLike[str], overrides: Sequence[str], within: str = "") -> Iterator[None]:
    """What is found wrong at keys of a job, which lies `within` the file, is told with the line of each."""
    try:
        yield
    except KeyedError as error:
        if not error.findings:
            raise
        where = locate(path, overrides)
        raise type(error)("\n".join(f"{where(within + key)}: {text}" for key, text in error.findings)) from error


def job_from_values(values: dict[str, Any], place: str = "job") -> Job:
    """A valid job from plain values with resolved paths, as `job_to_dict` gives them.

    Raises JobError with every problem, each beginning with `place`.
    """
    return Draft(place, document.Document(value=copy.deepcopy(values)), lines_shown=False).job()


def resolve_runs(job_path: str | os.PathLike[str], job: Job) -> str:
    """The absolute folder of the runs of a job that was read from `job_path`."""
    return paths.runs_folder(os.fspath(job_path), job.runs)[0]


def _resolve(name: str, job: Job, tell: Callable[[str], None], draft: Draft) -> Job:
    base = paths.base_folder(name)
    _refuse_places_of_the_shell(job, base, draft)
    update: dict[str, Any] = _resolved_places(name, job, tell)
    places: dict[str, Any] = {
        key: paths.absolute_location(place, base)
        for key in ("train", "val", "test")
        if isinstance(place := getattr(job.data, key), str)
    }
    if job.data.cache.folder is not None:
        folder = paths.absolute(job.data.cache.folder, base)
        places["cache"] = job.data.cache.model_copy(update={"folder": folder})
    update["data"] = job.data.model_copy(update=places)
    if isinstance(job.model, BackboneModel) and isinstance(job.model.pretrained, str):
        update["model"] = job.model.model_copy(update={"pretrained": paths.absolute(job.model.pretrained, base)})
    if isinstance(job.objective, OwnObjective):
        update["objective"] = _found_code("objective", name, job.objective, draft)
    if isinstance(job.model, FileModel):
        update["model"] = _found_code("model", name, job.model, draft)
    return job.model_copy(update=update)


def _refuse_places_of_the_shell(job: Job, base: FilePath, draft: Draft) -> None:
    """Raise JobError for relative paths given by `--set` that are right in the folder that the user is in alone."""
    given: dict[str, Any] = {f"data.{key}": getattr(job.data, key) for key in ("train", "val", "test")}
    if isinstance(job.model, BackboneModel):
        given["model.pretrained"] = job.model.pretrained
    errors = [
        draft.fault(key, fault)
        for key, place in given.items()
        if isinstance(place, str) and draft.is_set(key) and (fault := paths.elsewhere_fault(place, base))
    ]
    if errors:
        raise errors[-1]  # each names those before it too


def _found_code(key: str, name: str, section: _Own, draft: Draft) -> _Own:
    """The section with the absolute path of its file and the hash. Raises JobError.

    A relative path follows the rule of `runs`, or, where nothing lies there, begins beside the job file.
    """
    path = paths.absolute(section.file, paths.base_folder(name))
    if not os.path.exists(path):
        path = paths.absolute(section.file, FilePath(os.path.abspath(name)).parent)
    try:
        source = own_code.read(path)
    except ValueError as error:
        raise draft.fault(f"{key}.file", str(error)) from None
    wrong = own_code.class_fault(source, path, (section.model_extra or {}).get("class"))
    if wrong is not None:
        raise draft.fault(f"{key}.{wrong[0]}", wrong[1])
    errors = [draft.fault(*fault) for fault in own_code.option_faults(key, source, path, section.model_dump())]
    if errors:
        raise errors[-1]  # each names those before it too
    found = own_code.sha256(source)
    if section.sha256 not in (None, found):
        raise draft.fault(f"{key}.sha256", f"must be that of {path} ({found}) or left out, got {section.sha256}")
    return section.model_copy(update={"file": path, "sha256": found})


def _resolved_places(name: str, job: Job | SearchJob, tell: Callable[[str], None]) -> dict[str, Any]:
    """Absolute `runs` and `tracking` of a job."""
    runs, line = paths.runs_folder(name, job.runs)
    if line is not None:
        tell(line)
    if job.tracking.uri is None:
        return {"runs": runs}
    uri = paths.absolute_tracking(job.tracking.uri, paths.base_folder(name))
    return {"runs": runs, "tracking": job.tracking.model_copy(update={"uri": uri})}


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
