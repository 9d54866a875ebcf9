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
