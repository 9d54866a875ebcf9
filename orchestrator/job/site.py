"""What a cluster has and how it wants to be asked: a small YAML file that its administrator writes once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from orchestrator import __version__
from orchestrator.errors import JobError
from orchestrator.job import document
from orchestrator.job.messages import problems
from orchestrator.job.section import Count, Positive, Section, Words
from orchestrator.job.show import dotted

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def _label(text: str) -> str:
    if _LABEL.fullmatch(text) is None:
        raise PydanticCustomError("name", "must be lower-case letters, digits and dashes, 63 at most")
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/") or text == "/":
        raise PydanticCustomError("location", "must be an absolute path below /")
    return text.rstrip("/")


def _pinned(text: str) -> str:
    """An image whose name says which one it is, today and tomorrow."""
    tag = text.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in text and (not tag or tag == "latest"):
        raise PydanticCustomError("words", "must be an image with a tag other than latest, or with a digest")
    return text


class KubeRaySite(Section):
    """A Kubernetes namespace with the KubeRay operator, and the volume that all pods share."""

    namespace: Annotated[str, AfterValidator(_label)] = "orchestrator"
    image: Annotated[Words, AfterValidator(_pinned)] = f"hff-orchestrator:{__version__}"
    claim: Annotated[str, AfterValidator(_label)] = "shared"
    mount: Annotated[Words, AfterValidator(_absolute)] = "/shared"


class SlurmSite(Section):
    """Where a batch job goes, how long it may run, and the lines of shell that activate the environment."""

    partition: Words | None = None
    account: Words | None = None
    hours: Positive = 24.0
    setup: Annotated[tuple[Words, ...], Field(strict=False)] = ("source .venv/bin/activate",)


class Site(Section):
    """The nodes of a cluster: how many workers fit on one, and the memory of each."""

    workers_per_node: Count = 8
    memory_gib_per_worker: Count = 8
    shared_memory_gib: Count = 4
    kuberay: KubeRaySite = KubeRaySite()
    slurm: SlurmSite = SlurmSite()


def load_site(path: Path | None) -> Site:
    """The site of a file, the defaults without one. Raises JobError with every problem, one a line."""
    if path is None:
        return Site()
    try:
        read = document.read(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"--site: {path}: must be a readable YAML file, got: {error}") from None
    found = [(fault.line, dotted(fault.path), fault.text) for fault in read.faults]
    if not found and not isinstance(read.value, dict):
        found.append((1, "", "must be a mapping of keys (workers_per_node, kuberay, slurm, ...)"))
    if not found:
        try:
            return Site.model_validate(read.value)
        except ValidationError as error:
            for problem in problems(error.errors(), read.value, Site):
                line = read.lines.get(problem.path) or read.lines.get(problem.path[:-1], 1)
                found.append((line, dotted(problem.path), problem.text))
    lines = [f"{path}:{line}: {key}: {text}" if key else f"{path}:{line}: {text}" for line, key, text in sorted(found)]
    raise JobError("\n".join(lines))
