"""Saving a checkpoint with all workers: it becomes whole, or the failure is counted and training goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError

from orchestrator.errors import OrchestratorError
from orchestrator.pipeline.stage import Stage
from orchestrator.run import checkpoint
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder

# So many failed saves in a row end the run: what it has learned since the last one would be lost.
MOST_FAILURES = 3
# What a full disk looks like, depending on who writes.
_FAULTS = (OSError, SafetensorError, RuntimeError)


@dataclass
class Saver:
    """Every stage writes its layers, then rank 0 makes them one checkpoint and deletes old ones.

    `writes`: whether this worker is the replica of its stage that saves; `leads`: whether it is rank 0.
    """

    folder: RunFolder
    attempt: int
    stage: Stage
    control: Control
    writes: bool
    leads: bool
    keep_last: int
    failed: int = 0

    def save(self, step: int, state: Mapping[str, Any], *, must: bool) -> None:
        """Save after `step` steps. All workers return, or raise OrchestratorError, together.

        A save that fails (a full disk, a store that does not answer) leaves the older checkpoints as they are; it
        is an error when it `must` succeed, or for the third time in a row.
        """
        began = time.perf_counter()
        entries: list[checkpoint.FileEntry] = []
        fault: str | None = None
        try:
            entries = self._layers(step)
        except _FAULTS as error:
            fault = str(error)
        parts = self.control.gather((entries, fault))
        faults = [fault for _, fault in parts if fault is not None]
        if self.leads and not faults:
            try:
                everything = [entry for part, _ in parts for entry in part]
                checkpoint.commit(self.folder, step, self.attempt, state, everything)
                checkpoint.prune(self.folder, self.keep_last)
                seconds = time.perf_counter() - began
                self.folder.append_event({"event": "checkpoint", "step": step, "seconds": seconds})
            except OSError as error:
                faults = [str(error)]
        faults = self.control.broadcast(faults)
        if not faults:
            self.failed = 0
            return
        self._give_up(step, faults[0], must=must)

    def _layers(self, step: int) -> list[checkpoint.FileEntry]:
        entries: list[checkpoint.FileEntry] = []
        if self.writes:
            where = checkpoint.temporary_folder(self.folder, step, self.attempt)
            for i, (layer, optimizer) in enumerate(zip(self.stage.layers, self.stage.optimizers, strict=True)):
                entries += checkpoint.save_layer(where, self.stage.first + i, layer, optimizer)
        return entries

    def _give_up(self, step: int, fault: str, *, must: bool) -> None:
        self.failed += 1
        text = f"the checkpoint of step {step} could not be written: {fault}"
        if self.leads:
            shutil.rmtree(checkpoint.temporary_folder(self.folder, step, self.attempt), ignore_errors=True)
        if must or self.failed == MOST_FAILURES:
            times = "" if must else f" ({self.failed} failures in a row)"
            raise OrchestratorError(
                f"{text}{times}; make room in {self.folder.checkpoints} or set checkpoint.keep_last lower, then run "
                "the same command again: it goes on from the newest whole checkpoint"
            )
        if self.leads:
            more = f"warning {self.failed} of {MOST_FAILURES - 1}; training goes on, older checkpoints are untouched"
            self.folder.append_event({"event": "warning", "text": f"{text}; {more}"})
