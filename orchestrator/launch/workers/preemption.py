"""A node that is about to be taken away: the run saves, and starts again elsewhere on a budget of its own."""

from __future__ import annotations

from orchestrator.run.folder import RunFolder, read_json


class Preemptions:
    """Those that one drive has seen, at most `most`; a worker that is told of one leaves a notice (run/heartbeat)."""

    def __init__(self, folder: RunFolder, most: int) -> None:
        self._folder, self._most, self._seen = folder, most, 0

    def again(self, attempt: int) -> str | None:
        """Why there is to be another attempt after this one; None when it had no notice, or one too many."""
        notice = read_json(self._folder.notice_file(attempt))
        if notice is None or self._seen == self._most:
            return None
        self._seen += 1
        what, count = notice["what"], f"preemption {self._seen} of {self._most}"
        return f"{what}: starting again elsewhere from the newest checkpoint ({count})"
