"""An objective or a model in a file of the user's: found, parsed and hashed, never run here. No torch."""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Mapping
from typing import Any

from orchestrator.job.show import show

LARGEST_BYTES = 2**20
# What a section with a file says itself; all other keys are options of the class.
KEYS = {
    "objective": ("name", "file", "class", "sha256", "block_size"),
    "model": ("arch", "file", "class", "sha256", "layers", "head_grid", "vote"),
}
# How many arguments a class gets by place, and which by name, beside its options.
_PASSED: dict[str, tuple[int, tuple[str, ...]]] = {"objective": (2, ("grid",)), "model": (0, ())}
# Their own constructors take no options, and they are no dataclasses.
_BASES = ("Head", "Architecture")


def is_own(section: Mapping[str, Any]) -> bool:
    """Whether a resolved `model` or `objective` section names a class in a file of the user's."""
    return "own" in (section.get("name"), section.get("arch"))


def options(key: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """What is passed on to the class, from the resolved section `key`."""
    return {name: value for name, value in section.items() if name not in (*KEYS[key], "source")}


def sha256(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def read(path: str) -> str:
    """The text of the file. Raises ValueError with what it must be where it cannot hold a class."""
    try:
        with open(path, "rb") as file:
            source = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"must be a Python file, got no such file: {path}") from None
    except OSError as error:
        raise ValueError(f"must be a readable Python file, got {path}: {error.strerror}") from None
    if len(source) > LARGEST_BYTES:
        raise ValueError(f"must be a Python file of at most 1 MiB, got more: {path}")
    try:
        return source.decode()
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise ValueError(f"must be UTF-8 text, got {path}:{line}: the byte 0x{source[error.start]:02x}") from None


def class_fault(source: str, path: str, name: object) -> tuple[str, str] | None:
    """Which key of the section is wrong, and what it must be; None where the file defines the class."""
    try:
        tree = ast.parse(source, path)
    except SyntaxError as error:
        return "file", f"must be valid Python, got {path}:{error.lineno}: {error.msg}"
    except ValueError as error:
        return "file", f"must be valid Python, got {path}: {error}"
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if name in classes:
        return None
    near = difflib.get_close_matches(name, classes, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(classes) or "none"
    return "class", f"must be a class that {path} defines at its top level (it has: {known}), got {show(name)}{hint}"


def option_faults(key: str, source: str, path: str, section: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options of the section that the class, which the file defines, has not: the key of each and what it must be.

    Nothing where only running the code could tell, as of a constructor that takes any or comes from another file.
    """
    name = section["class"]
    known = _option_names(key, ast.parse(source, path), name)
    if known is None:
        return []
    faults = []
    for option in options(key, section):
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            has = ", ".join(known) or "none"
            faults.append((f"{key}.{option}", f"must be an option of {name} of {path} (it has: {has}){hint}"))
    return faults


def _option_names(key: str, tree: ast.Module, name: str) -> list[str] | None:
    """The options that the constructor of a class takes; None where the text of the file does not say."""
    (*others, found) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    makers = [n for n in found.body if isinstance(n, ast.FunctionDef) and n.name in ("__init__", "__new__")]
    if others or found.keywords:
        return None
    if found.decorator_list:
        return None if makers else _fields(found)
    if [maker.name for maker in makers] != ["__init__"] or makers[0].decorator_list or makers[0].args.kwarg:
        return None
    taken, (places, names) = makers[0].args, _PASSED[key]
    free = [one for one in [*taken.posonlyargs, *taken.args][1 + places :] if one not in taken.posonlyargs]
    return [one.arg for one in [*free, *taken.kwonlyargs] if one.arg not in names]


def _fields(found: ast.ClassDef) -> list[str] | None:
    """The fields of a plain dataclass; None for a class that is something else, or gets some from elsewhere."""
    (decorator, *more), bases = found.decorator_list, [ast.unparse(base).rpartition(".")[2] for base in found.bases]
    if more or not ast.unparse(decorator).partition("(")[0].endswith("dataclass") or not set(bases) <= set(_BASES):
        return None
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    if any("ClassVar" in ast.unparse(node) or "init=" in ast.unparse(node) for node in fields):
        return None
    return [ast.unparse(node.target) for node in fields]
