"""The programs of a cluster's own: called by name, their failures told in our words."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from orchestrator.errors import JobError, OrchestratorError


def call(words: Sequence[str], text: str, *, instead: str) -> str:
    """What a program prints when it is given `text`.

    Raises JobError, with what to do `instead`, when this machine does not have it; OrchestratorError when it fails.
    """
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise JobError(f"{words[0]}: must be installed to submit from here, got no such program; {instead}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise OrchestratorError(f"{' '.join(words[:3])} failed with exit code {done.returncode}: {said[-1]}")
    return done.stdout.strip()
