"""The user's own objective and network as classes: a file runs once in each process, its mistakes are the job's."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from orchestrator.errors import JobError, first_line
from orchestrator.job import own_code
from orchestrator.job.schema import Job
from orchestrator.run.folder import RunFolder, write_atomically


def own_class(key: str, section: Mapping[str, Any], base: type) -> type:
    """The class that the resolved section `key` with a file names, a subclass of `base`. Raises JobError.

    The code is `source` where the section holds it (a network away from its run), else that of `file`.
    """
    path, source = str(section["file"]), section.get("source")
    if source is None:
        try:
            source = own_code.read(path)
        except ValueError as error:
            raise JobError(f"{key}.file: {error}") from None
    if section["sha256"] not in (None, own_code.sha256(source)):
        raise JobError(f"{key}.file: {path} has changed since the job was read; start afresh with --resume never")
    name = str(section["class"])
    kind = getattr(_module_of(key, path, source), name, None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        wanted = f"{base.__module__}.{base.__qualname__}"
        raise JobError(f"{key}.class: must be a subclass of {wanted}, got {name} of {path}")
    return kind


@functools.lru_cache(maxsize=8)
def _module_of(key: str, path: str, source: str) -> ModuleType:
    module = ModuleType(f"{key}_{own_code.sha256(source)[:12]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        raise JobError(f"{key}.file: must be a module that can be run, got {told(error, path)}") from error
    return module


def told(error: Exception, path: str) -> str:
    """The error in one line, with the line of the user's file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    what = f"{type(error).__name__}: {first_line(error)}"
    return f"{path}:{lines[-1]}: {what}" if lines else what


def kept_code(job: Job, folder: RunFolder) -> tuple[Job, Job]:
    """Copy the user's own code into the run's folder; the job that reads the copies, and as it is written down.

    Written down with the files' names alone, which are relative to the job file: run folders may be moved.
    """
    reading = written = job
    for key, copy in folder.own_code.items():
        section = getattr(job, key)
        if not own_code.is_own(section.model_dump()):
            continue
        write_atomically(copy, own_code.read(section.file))
        reading = reading.model_copy(update={key: section.model_copy(update={"file": str(copy)})})
        written = written.model_copy(update={key: section.model_copy(update={"file": copy.name})})
    return reading, written


def with_source(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with the code itself, for a network that leaves its run's folder; others as they are."""
    return {**section, "source": own_code.read(str(section["file"]))} if own_code.is_own(section) else dict(section)
