"""Saving a checkpoint with all workers: it becomes whole, or the failure is counted and training goes on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError

from hff.averages import WeightAverage
from orchestrator.errors import OrchestratorError
from orchestrator.pipeline.stage import Stage
from orchestrator.run import checkpoint
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder
from orchestrator.run.stores.attached import Uploads

# So many failed saves in a row end the run: what it has learned since the last one would be lost.
MOST_FAILURES = 3
# What a full disk looks like, depending on who writes.
_FAULTS = (OSError, SafetensorError, RuntimeError)


@dataclass(frozen=True)
class _Save:
    """What is saved: the run's `state` after `step` steps and this worker's layers by their global index.

    `held_up_s`: seconds that training waited for a save that goes on beside it.
    """

    step: int
    state: Mapping[str, Any]
    layers: Mapping[int, checkpoint.LayerState]
    must: bool
    began: float
    held_up_s: float | None


@dataclass
class Saver:
    """Every stage writes its layers, then rank 0 makes them one checkpoint and deletes old ones.

    `writes`: whether this worker is the replica of its stage that saves; `leads`: whether it is rank 0. In the
    `background` training goes on once the layers are copied, while a thread does the rest, one save at a time; no
    other thread may then use `control`.
    """

    folder: RunFolder
    attempt: int
    stage: Stage
    control: Control
    writes: bool
    leads: bool
    keep_last: int
    background: bool = False
    uploads: Uploads | None = None
    failed: int = 0
    _beside: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)

    def save(self, step: int, state: Mapping[str, Any], *, must: bool) -> None:
        """Save after `step` steps, when the save before has ended; all workers call this.

        A save that fails (a full disk, a store that does not answer) leaves the older checkpoints as they are; it
        is an OrchestratorError when it `must` succeed, or for the third time in a row. One that must has ended when
        this returns; the error of one in the background is raised by the next `check` or `save`.
        """
        began = time.perf_counter()
        self.drain()
        self.check()
        beside = self.background and not must
        layers = self._layers(apart=beside) if self.writes else {}
        held_up_s = time.perf_counter() - began if beside else None
        save = _Save(step, state, layers, must, began, held_up_s)
        if beside:
            self._beside = threading.Thread(target=self._write_beside, args=[save], name="save", daemon=True)
            self._beside.start()
        else:
            self._write(save)

    def check(self) -> None:
        """Raise what a save in the background ended with."""
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Wait for the save in the background, if there is one."""
        if self._beside is not None:
            self._beside.join()
            self._beside = None

    def settled(self) -> bool:
        """Whether the last save succeeded, on all workers alike; waits for one in the background."""
        self.drain()
        self.check()
        return self.failed == 0

    def _layers(self, *, apart: bool) -> dict[int, checkpoint.LayerState]:
        averages: Sequence[WeightAverage | None] = self.stage.averages or [None] * len(self.stage.layers)
        each = zip(self.stage.layers, self.stage.optimizers, averages, strict=True)
        return {self.stage.first + i: checkpoint.layer_state(*parts, apart=apart) for i, parts in enumerate(each)}

    def _write_beside(self, save: _Save) -> None:
        try:
            self._write(save)
        except BaseException as error:
            self._error = error

    def _write(self, save: _Save) -> None:
        """Write this worker's files, learn of those of the others, and make one checkpoint of them all."""
        entries: list[checkpoint.FileEntry] = []
        fault: str | None = None
        where = checkpoint.temporary_folder(self.folder, save.step, self.attempt)
        try:
            for index, layer in save.layers.items():
                entries += checkpoint.save_layer(where, index, layer)
        except _FAULTS as error:
            fault = str(error)
        parts = self.control.gather((entries, fault))
        faults = [fault for _, fault in parts if fault is not None]
        if self.leads and not faults:
            try:
                everything = [entry for part, _ in parts for entry in part]
                checkpoint.commit(self.folder, save.step, self.attempt, save.state, everything)
                checkpoint.prune(self.folder, self.keep_last, save.step)
                seconds = time.perf_counter() - save.began
                held_up_s = seconds if save.held_up_s is None else save.held_up_s
                event = {"event": "checkpoint", "step": save.step, "seconds": seconds, "training_waited_s": held_up_s}
                self.folder.append_event(event)
            except OSError as error:
                faults = [str(error)]
        faults = self.control.broadcast(faults)
        remedy = f"make room in {self.folder.checkpoints} or set checkpoint.keep_last lower"
        if not faults and self.uploads is not None:
            faults = self._upload(self.uploads, save.step, [entry.name for entry in entries])
            remedy = f"it is whole in {self.folder.checkpoints}: see that the store can be written"
        if not faults:
            self.failed = 0
            return
        self._give_up(save.step, faults[0], remedy, must=save.must)

    def _upload(self, uploads: Uploads, step: int, names: list[str]) -> list[str]:
        """Bring a save that is whole here to the store, the manifest last; what went wrong."""
        began = time.perf_counter()
        fault = uploads.send(step, names)
        faults = [fault for fault in self.control.gather(fault) if fault is not None]
        if self.leads and not faults:
            faults = uploads.finish(step)
            seconds = time.perf_counter() - began
            self.folder.append_event({"event": "upload", "step": step, "seconds": seconds, "whole": not faults})
        agreed: list[str] = self.control.broadcast(faults)
        uploads.clear(step)
        return agreed

    def _give_up(self, step: int, fault: str, remedy: str, *, must: bool) -> None:
        self.failed += 1
        text = f"the checkpoint of step {step} could not be written: {fault}"
        if self.leads:
            shutil.rmtree(checkpoint.temporary_folder(self.folder, step, self.attempt), ignore_errors=True)
        if must or self.failed == MOST_FAILURES:
            times = "" if must else f" ({self.failed} failures in a row)"
            raise OrchestratorError(
                f"{text}{times}; {remedy}, then run the same command again: it goes on from the newest whole checkpoint"
            )
        if self.leads:
            more = f"warning {self.failed} of {MOST_FAILURES - 1}; training goes on, older checkpoints are untouched"
            self.folder.append_event({"event": "warning", "text": f"{text}; {more}"})
