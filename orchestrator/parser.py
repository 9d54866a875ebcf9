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
            flags = [flag for action in own._actions for flag in action.option_strings if action.dest != "help"]
            wrong = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
            hint = (_key_of_job(wrong, unknown) if "--set" in flags else "") or near(wrong, flags)
            own.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
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


def _key_of_job(flag: str, unknown: Sequence[str]) -> str:
    """A hint at `--set` for a flag that is the last word of one or two keys of a job, or one in other tools' words."""
    from orchestrator.job.hints import SYNONYMS
    from orchestrator.job.repair import KNOWN_PATHS

    key = flag.lstrip("-").replace("-", "_")
    place = next(i for i, word in enumerate(unknown) if word.startswith(flag))
    values = [unknown[place].partition("=")[2], *unknown[place + 1 : place + 2]]
    value = next((value for value in values if value and not value.startswith("--")), "VALUE")
    every = {path for kind in ("train", "transfer") for path in KNOWN_PATHS[kind]}
    known = {".".join(path) for path in every - {path[:n] for path in every for n in range(len(path))}}
    ending = [path for path in known if path.rpartition(".")[2] == SYNONYMS.get(key, key)]
    found = [key] if key in known else sorted(ending)
    if not 1 <= len(found) <= 2:
        return ""
    return f"; did you mean {' or '.join(f'--set {path}={value}' for path in found)}?"


def near(word: str, known: Iterable[str], synonyms: Mapping[str, str] | None = None) -> str:
    """A hint at the word that was meant, by its letters or those of a synonym; nothing where none is like it."""
    meant = {**(synonyms or {}), **{one: one for one in known}}
    found = difflib.get_close_matches(word, meant, n=1)
    return f"; did you mean {meant[found[0]]}?" if found else ""
