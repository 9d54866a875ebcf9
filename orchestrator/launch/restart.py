"""What to do after a failed attempt: a pure decision over what has failed so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import OrchestratorError


@dataclass(frozen=True)
class Failure:
    """How an attempt ended: at which step, the first cause, and what the other workers saw after it.

    `final` failures (bad job, data or checkpoint) come again however often one tries.
    """

    step: int | None
    message: str
    traceback: str
    exit_code: int
    final: bool
    others: tuple[str, ...]

    @property
    def headline(self) -> str:
        return f"{self.message.splitlines()[0]} (at step {self.step})"

    def error(self, why: str) -> OrchestratorError:
        """The exception for the user: the first cause, then what followed from it, then what was decided."""
        parts = [self.message]
        if self.traceback:
            parts.append(self.traceback.rstrip())
        parts += [f"  then {line}" for line in self.others]
        if why:
            parts.append(why)
        if self.traceback:
            # A long trace scrolls the cause away; it stands again where the eye ends.
            parts.append(f"First cause: {self.headline}")
        error = OrchestratorError("\n".join(parts))
        error.exit_code = self.exit_code
        return error


@dataclass(frozen=True)
class Action:
    """Whether to stop, and the reason in words."""

    stop: bool
    why: str


def next_action(failures: Sequence[Failure], max_failures: int, *, asked: bool = False) -> Action:
    """Stop on errors that come again, on the same crash at the same step, and when the budget is spent.

    So does a run that was `asked` to stop, whatever its attempt ended with.
    """
    last = failures[-1]
    if last.final:
        return Action(True, "")
    if asked:
        return Action(True, "It was told to stop, so it is not started again: run the same command to go on.")
    if any(f.step == last.step and f.message == last.message for f in failures[:-1]):
        return Action(True, "The same failure at the same step twice: stopping.")
    if len(failures) > max_failures:
        return Action(True, f"That is more than cluster.max_failures ({max_failures}): stopping.")
    return Action(False, f"starting again from the newest checkpoint (failure {len(failures)} of {max_failures})")
