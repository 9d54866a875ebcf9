"""Errors that a user can act on. Each class carries the exit code of the command line."""

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_OTHER = 1
EXIT_JOB = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_INTERRUPTED = 75


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class OrchestratorError(Exception):
    """Anything that stops a command for a reason that is told in one message."""

    exit_code = EXIT_OTHER


class KeyedError(OrchestratorError):
    """An error that may be about keys of a job.

    `findings` are these keys, each with what is wrong there, for those who know the job's file to say the lines;
    without a message they are the message.
    """

    def __init__(self, message: str = "", findings: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message or "\n".join(f"{key}: {text}" for key, text in findings))
        self.findings = tuple(findings)


class JobError(KeyedError):
    """A job file, an override or a command that cannot be carried out as written."""

    exit_code = EXIT_JOB


class DataError(KeyedError):
    """Shards, indexes or images that are missing, damaged or do not fit the job."""

    exit_code = EXIT_DATA


class CheckpointError(OrchestratorError):
    """A run or checkpoint that is missing, damaged or does not fit the job."""

    exit_code = EXIT_CHECKPOINT


class Interrupted(OrchestratorError):
    """A run that was stopped on purpose; its last checkpoint lets the same command go on."""

    exit_code = EXIT_INTERRUPTED
