"""argparse with our way of saying that a command is wrong: one line, with the word that was most likely meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.errors import JobError
from orchestrator.examples import commands

# What other tools call it.
_SYNONYMS = {
    "train": "run", "start": "run", "launch": "run", "fit": "run", "resume": "run", "search": "run",
    "validate": "check", "lint": "check", "test": "eval", "evaluate": "eval", "infer": "predict", "classify": "predict",
    "ls": "runs ls", "list": "runs ls", "show": "runs show", "compare": "runs compare", "pack": "data pack",
    "verify": "data verify", "stats": "data stats",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Raises JobError instead of ending the process."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise JobError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """As argparse does; of a flag that there is not the nearest one of its command is told."""
        arguments: argparse.Namespace
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            words = [getattr(arguments, name, None) for name in ("command", "action")]
            own = dict(commands(self))[" ".join(word for word in words if word)]
            flags = [flag for action in own._actions for flag in action.option_strings]
            wrong = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
            own.error(f"unrecognized arguments: {' '.join(unknown)}{near(wrong, flags)}")
        return arguments

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """A word that is none of the choices, where argparse would list them all."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        hint = (
            near(str(value), choices, _SYNONYMS if action.dest == "command" else {})
            or f" (choose from {', '.join(choices)})"
        )
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint}")


def near(word: str, known: Iterable[str], synonyms: Mapping[str, str] | None = None) -> str:
    """A hint at the word that was meant, by its letters or those of a synonym; nothing where none is like it."""
    meant = {**(synonyms or {}), **{one: one for one in known}}
    found = difflib.get_close_matches(word, meant, n=1)
    return f"; did you mean {meant[found[0]]}?" if found else ""
