"""docs/job-reference.md, made from the schema: python -m orchestrator.job.reference > docs/job-reference.md"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.job.meanings import MEANINGS
from orchestrator.job.messages import annotated, bare, describe, is_section, members_of
from orchestrator.job.repair import KINDS
from orchestrator.job.show import show

Section = type[BaseModel]
_INTRO = """\
# Job reference

Every key of a job file, made from the schema by `python -m orchestrator.job.reference`. A key of a section is written
`train.lr`, in the file and with `--set train.lr=1e-3` alike. Unknown keys are errors. Relative paths, of `--set`
too, begin at the job file's nearest parent with pyproject.toml or .git, else beside it. What the words mean and how
they go together stands in the pages about [data](data.md), the [pipeline](pipeline.md), [search](search.md) and
[transfer](transfer.md)."""
_KINDS = {
    "train": "A network of our own.",
    "transfer": "A timm backbone: all keys of `kind: train` but `model`, and these. Where a key stands in both, this "
    "is what it is here.",
    "search": "Many trials over one base job. `tracking` is that of `kind: train`.",
}
# Filled in when the file is read, by what else it says.
_FILLED = {"data.mean": "0.5 in each channel", "data.std": "0.25 in each channel"}


@dataclass(frozen=True)
class Row:
    """One key: its path, what it may be, its default and its meaning."""

    path: str
    accepts: str
    default: str
    meaning: str


def rows(section: Section, path: str = "") -> Iterator[Row]:
    """The keys of a section and of the sections within it; lists of sections have `N`, mappings `PATH` in the path."""
    for name, info in section.model_fields.items():
        full = f"{path}{name}"
        inner = [m for m in members_of(bare(annotated(info))[0]) if is_section(m)]
        only = bool(inner) and len(members_of(bare(annotated(info))[0])) == len(inner)
        if not only:
            yield _row(full, info)
        for member in inner:
            yield from rows(member, f"{full}.")
        several = _several(bare(annotated(info))[0])
        if several is not None:
            yield from rows(several[0], f"{full}.{several[1]}.")


def _several(kind: Any) -> tuple[Section, str] | None:
    """The section that a list (`N`) or a mapping (`PATH`) is made of; None for other types."""
    word = {tuple: "N", dict: "PATH"}.get(get_origin(kind))
    inner = [m for item in get_args(kind) for m in members_of(bare(item)[0]) if is_section(m)] if word else []
    return (inner[0], word) if word and inner else None


def _row(path: str, info: FieldInfo) -> Row:
    kind = annotated(info)
    accepts = "a list of mappings" if (found := _several(bare(kind)[0])) and found[1] == "N" else describe(kind)
    key = path.replace(".N.", ".").replace(".PATH.", ".")
    return Row(path, accepts, _default(path, info), MEANINGS.get(key, ""))


def _default(path: str, info: FieldInfo) -> str:
    if info.is_required():
        return _FILLED.get(path, "required")
    value = info.get_default(call_default_factory=True, validated_data={})
    return "none" if value is None else show(value).replace("'", "")


def tables(kind: str) -> Iterator[tuple[str, str, list[Row]]]:
    """Heading, introduction and keys of every table of a kind: the top, then each section."""
    root = KINDS[kind]
    top: list[Row] = []
    below: list[tuple[str, str, list[Row]]] = []
    for name, info in root.model_fields.items():
        inner = [m for m in members_of(bare(annotated(info))[0]) if is_section(m)]
        for member in inner:
            tag = "" if info.discriminator is None else f", {info.discriminator}: {_tag(member, info.discriminator)}"
            own = list(rows(member, f"{name}."))
            if member.model_config.get("extra") == "allow":
                own = _of_a_file(own, name, str(info.discriminator))
            below.append((f"{name}{tag}", inspect.cleandoc(member.__doc__ or ""), own))
        if not inner:
            top += [row for row in rows(root) if row.path.split(".")[0] == name]
    yield "top", "", top
    yield from below


def _of_a_file(own: list[Row], name: str, tag: str) -> list[Row]:
    """The keys of a section with a file: what it is follows from the file, and a class in it has to be named."""
    own = [replace(row, default="own, with a file") if row.path == f"{name}.{tag}" else row for row in own]
    place = [row.path for row in own].index(f"{name}.file") + 1
    return [*own[:place], Row(f"{name}.class", "text", "required", "Name of the class in the file."), *own[place:]]


def _tag(section: Section, discriminator: Any) -> str:
    return str(get_args(section.model_fields[str(discriminator)].annotation)[0])


def text() -> str:
    """The whole page."""
    parts = [_INTRO]
    told: set[tuple[str, Row]] = set()
    for kind, introduction in _KINDS.items():
        parts.append(f"## kind: {kind}\n\n{introduction}")
        for heading, about, found in tables(kind):
            new = [row for row in found if (heading, row) not in told]
            told |= {(heading, row) for row in found}
            if new:
                title = f"### {kind}: on top" if heading == "top" else f"### {heading}"
                parts.append("\n\n".join(part for part in (title, about, _table(new)) if part))
    return "\n\n".join(parts) + "\n"


def _table(found: list[Row]) -> str:
    lines = ["| key | may be | default | |", "|---|---|---|---|"]
    lines += [f"| `{r.path}` | {r.accepts} | {r.default} | {r.meaning} |" for r in found]
    return "\n".join(line.replace("$", "\\$") for line in lines)


if __name__ == "__main__":
    print(text(), end="")
