"""`orchestrator completion SHELL`: a script that completes commands, flags and file names, made by shtab."""

from __future__ import annotations

import argparse

import shtab

from orchestrator.errors import EXIT_DONE
from orchestrator.examples import commands

_FILES = ("JOB", "FILE", "IMAGE", "SOURCE", "INDEX")
_FOLDERS = ("RUN", "RUNS", "OUT", "FOLDER")


def completion_command(parser: argparse.ArgumentParser, shell: str) -> int:
    """Print the script for bash or zsh; returns the exit code."""
    for _, command in commands(parser):
        for action in command._actions:
            kind = shtab.FILE if action.metavar in _FILES else shtab.DIRECTORY if action.metavar in _FOLDERS else None
            if kind is not None:
                action.complete = kind  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=shell))
    return EXIT_DONE
