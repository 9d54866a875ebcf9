"""Problems of a job in one form: `key.path: must be ..., got VALUE`, from pydantic's errors and the types."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.job.document import Path
from orchestrator.job.hints import SYNONYMS
from orchestrator.job.show import show

Root = type[BaseModel]
_UNSPOKEN = 10**6
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_LIMITS = (*_BOUNDS, "min_length", "max_length")
_BOUND_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_OWN_ERRORS = {"words", "name", "location"}
_TAG_ERRORS = {"union_tag_invalid", "union_tag_not_found"}


@dataclass(frozen=True)
class Problem:
    """One thing to change in a job: where, and what it must be; `meant` is the key that an unknown one stands for."""

    path: Path
    text: str
    missing: bool = False
    meant: Path | None = None


def problems(errors: Sequence[Any], raw: Any, root: Root) -> list[Problem]:
    """One problem per key from pydantic's error list; `raw` holds the values of a `root` as they were read."""
    found: dict[Path, Problem] = {}
    own: set[Path] = set()
    for error in errors:
        problem = _problem(error, raw, root)
        if problem is None:
            continue
        if problem.path not in found or (error["type"] in _OWN_ERRORS and problem.path not in own):
            found[problem.path] = problem
        if error["type"] in _OWN_ERRORS:
            own.add(problem.path)
    return list(found.values())


def _problem(error: Any, raw: Any, root: Root) -> Problem | None:
    loc, kind = error["loc"], error["type"]
    if kind == "missing" and isinstance(loc[-1], int):
        loc, kind = loc[:-1], "too_short"
    place = _place(loc, raw, root)
    if place is None:
        return None
    path, expected, section = place
    if kind == "extra_forbidden":
        near = _near_key(path[-1], section)
        meant = (*path[:-1], near) if near else None
        return Problem(path, _unknown_key(path, section, root, near), meant=meant)
    if kind in _TAG_ERRORS:
        tag = error["ctx"]["discriminator"].strip("'")
        path = (*path, tag)
        choices = _tags(section, path[-2], tag) if section is not None else ()
        expected, kind = _choice(choices), "missing" if kind == "union_tag_not_found" else kind
    if kind == "missing":
        return Problem(path, f"must be given ({expected}), got nothing", missing=True)
    value = lookup(raw, path)
    if kind in _OWN_ERRORS:
        return Problem(path, f"{error['msg']}, got {show(value)}")
    if kind in _BOUND_ERRORS and not isinstance(value, (list, tuple)):
        bounds = _bounds_with(expected, error)
        return Problem(path, f"must be {bounds}, got {show(value)}")
    if kind == "finite_number":
        return Problem(path, f"must be a finite number, got {show(value)}")
    return Problem(path, f"must be {expected}, got {show(value)}{_near_value(expected, value)}")


def lookup(raw: Any, path: Path) -> Any:
    """The value at a key path, None where there is none."""
    for key in path:
        if isinstance(raw, dict):
            raw = raw.get(key)
        elif isinstance(raw, (list, tuple)) and key.isdigit() and int(key) < len(raw):
            raw = raw[int(key)]
        else:
            return None
    return raw


def _place(loc: Sequence[Any], raw: Any, root: Root) -> tuple[Path, str, type[BaseModel] | None] | None:
    """The key path of pydantic's location, what belongs there, and the section around it.

    Pydantic puts the names of union members between the keys. None when the error is about a member
    that the value does not try to be.
    """
    path: Path = ()
    kind: Any = root
    section: type[BaseModel] | None = None
    discriminator: Any = None
    rest = list(loc)
    while True:
        whole, (kind, _) = kind, bare(kind)
        members = members_of(kind)
        if len(members) > 1:
            if not rest:
                break
            label, *rest = rest
            if discriminator is not None:
                kind = next(m for m in members if label in _literals(m, discriminator))
                continue
            model = next((m for m in members if is_section(m)), None)
            if model is None or not isinstance(lookup(raw, path), dict):
                break
            if label != model.__name__:
                return None
            kind = model
            continue
        if not rest:
            break
        key, *rest = rest
        path = (*path, str(key))
        if is_section(kind):
            section = kind
            info = kind.model_fields.get(str(key))
            if info is None:
                return path, "", section
            kind, discriminator = annotated(info), info.discriminator
        else:
            kind = _item(kind, key)
    return path, describe(whole), section


def annotated(info: FieldInfo) -> Any:
    """The type of a field with the bounds that pydantic has taken out of it."""
    kind: Any = info.annotation
    for metadata in info.metadata:
        kind = Annotated[kind, metadata]
    return kind


def bare(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without Annotated and without `| None`, and its metadata."""
    metadata: tuple[Any, ...] = ()
    while True:
        if get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            metadata = (*metadata, *more)
        elif len(members_of(kind)) == 1 and get_origin(kind) in (Union, UnionType):
            kind = members_of(kind)[0]
        else:
            return kind, metadata


def members_of(kind: Any) -> list[Any]:
    """What a union is made of, but for None; any other type alone."""
    if get_origin(kind) not in (Union, UnionType):
        return [kind]
    return [member for member in get_args(kind) if member is not type(None)]


def is_section(kind: Any) -> bool:
    """Whether a type is a mapping with keys of its own."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _item(kind: Any, index: Any) -> Any:
    items = get_args(kind)
    if len(items) == 2 and items[1] is Ellipsis:
        return items[0]
    return items[index] if isinstance(index, int) and index < len(items) else items[-1]


def _literals(section: Any, field: str) -> tuple[Any, ...]:
    return get_args(section.model_fields[field].annotation)


def _tags(section: type[BaseModel], field: str, tag: str) -> tuple[str, ...]:
    members = members_of(section.model_fields[field].annotation)
    return tuple(value for member in members for value in _literals(member, tag))


def describe(kind: Any) -> str:
    """What a type accepts, in words."""
    kind, metadata = bare(kind)
    members = members_of(kind)
    if len(members) > 1:
        return " or ".join(dict.fromkeys(describe(member) for member in members))
    if get_origin(kind) is Literal:
        return _choice(get_args(kind))
    if get_origin(kind) is dict:
        return "a mapping of keys"
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if items[-1] is Ellipsis:
            limits = _limits(metadata)
            count = f"{limits['min_length']} to {limits['max_length']} " if "max_length" in limits else ""
            return f"a list of {count}{_plural(describe(items[0]))}"
        return f"a list of {len(items)} {_plural(describe(items[0]))}"
    if is_section(kind):
        required = [n for n, f in kind.model_fields.items() if f.is_required()]
        return "{from_train: SHARE}" if required == ["from_train"] else "a mapping of keys"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "values"}[kind]
    return " ".join([words, *_bounds(metadata)]).strip()


def _plural(words: str) -> str:
    head, *tail = words.removeprefix("a ").split(" >", 1)
    for singular in ("whole number", "number", "mapping"):
        if head.startswith(singular):
            head = head.replace(singular, singular + "s", 1)
            break
    return " >".join([head, *tail])


def _limits(metadata: Sequence[Any]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for entry in metadata:
        for part in getattr(entry, "metadata", None) or [entry]:
            limits |= {k: v for k in _LIMITS if (v := getattr(part, k, None)) is not None}
    return limits


def _bounds(metadata: Sequence[Any]) -> list[str]:
    limits = _limits(metadata)
    spoken = [f"{sign} {limits[k]}" for k, sign in _BOUNDS.items() if k in limits and limits[k] < _UNSPOKEN]
    return [" and ".join(spoken)] if spoken else []


def _bounds_with(expected: str, error: Any) -> str:
    """The bounds out of a description; the broken one also when it is too large to be told otherwise."""
    key = next(k for k in _BOUNDS if k in error["ctx"])
    broken = f"{_BOUNDS[key]} {error['ctx'][key]:g}" if isinstance(error["ctx"][key], float) else ""
    broken = broken or f"{_BOUNDS[key]} {error['ctx'][key]}"
    bounds = expected[min((i for sign in "<>" if (i := expected.find(sign)) >= 0), default=len(expected)) :]
    return bounds if broken in bounds else broken


def _choice(values: Sequence[Any]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _near_value(expected: str, value: Any) -> str:
    if not expected.startswith("one of ") or not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value, expected.removeprefix("one of ").split(", "), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _near_key(key: str, section: type[BaseModel] | None) -> str | None:
    """The key of a section that an unknown one is like, or that is our word for it."""
    known = list(section.model_fields) if section is not None else []
    near = [SYNONYMS[key]] if SYNONYMS.get(key) in known else difflib.get_close_matches(key, known, n=1)
    return near[0] if near else None


def _unknown_key(path: Path, section: type[BaseModel] | None, root: Root, near: str | None) -> str:
    """Unknown keys: the nearest known one, a key of the same name elsewhere, or the list."""
    known = list(section.model_fields) if section is not None else []
    key = path[-1]
    text = f"must be a known key, got {show(key)}"
    owners = [".".join(p[:-1]) for p in known_paths(root) if p[-1] == key and p[:-1] != path[:-1]]
    objectives = _objectives_with(key, root) if path[:-1] == ("objective",) else []
    if objectives:
        have = f"objective {objectives[0]} alone has" if len(objectives) == 1 else f"{', '.join(objectives)} alone have"
        return f"must be left out ({have} it), got {show(key)}"
    if near:
        text += f"; did you mean {near!r}?"
    elif owners:
        text += f"; did you mean '{owners[0]}.{key}'?" if owners[0] else f"; did you mean {key!r} on top?"
    if (not near and not owners) or path[:-1] == ("data", "augment"):
        text += f" (known: {', '.join(known)})"
    return text


def _objectives_with(key: str, root: Root) -> list[str]:
    """The names of the objectives that have a key."""
    members = members_of(root.model_fields["objective"].annotation)
    return [name for member in members if key in member.model_fields for name in _literals(member, "name")]


def known_paths(root: Root) -> Iterator[Path]:
    """The key paths of all values that a job of this kind can have."""
    return _paths(root, ())


def _paths(section: Any, path: Path) -> Iterator[Path]:
    for name, info in section.model_fields.items():
        sections = [m for m in members_of(bare(annotated(info))[0]) if is_section(m)]
        yield (*path, name)
        for member in sections:
            yield from _paths(member, (*path, name))
