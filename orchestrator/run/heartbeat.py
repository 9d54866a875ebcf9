"""A thread beside the loop: where it is, for those who watch; the wish to stop, both ways; a look for stalls."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.pipeline.advice import StageTime
from orchestrator.pipeline.stage import StageTimes
from orchestrator.run.context import Context
from orchestrator.run.folder import RunFolder, write_json
from orchestrator.run.records.events import fractions

PERIOD_S = 0.4
# Beats between two looks at the clocks of the stage.
_EVERY = 4


class Heartbeat:
    """Rank 0 writes progress and looks for the stop file; any rank that was signalled creates that file.

    So does one whose node is about to be taken away; the notice that it leaves beside tells the driver why.
    `state` is what the loop wants known; it is copied at every beat. A worker that trains and makes no step for
    `stall_s` seconds writes the stacks of its threads into the run folder, once. With `stage`, its index and a look
    at its clocks, it also writes what that stage does with its time.
    """

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        context: Context,
        *,
        stall_s: float = 240.0,
        stage: tuple[int, Callable[[], StageTimes]] | None = None,
    ) -> None:
        self._folder, self._attempt, self._context = folder, attempt, context
        self._stage, self._clocks = stage, StageTimes()
        self._stall_s, self._since = stall_s, time.monotonic()
        self._last: tuple[object, object] = (None, None)
        self._ended = threading.Event()
        self._stop_seen = False
        self.state: dict[str, Any] = {"attempt": attempt, "epoch": 0, "step": 0, "steps_total": 0}
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._context.rank == 0:
            self._write()

    def stop_requested(self) -> bool:
        return self._stop_seen or self._context.stop_requested()

    def _write(self) -> None:
        # A full disk must not end this thread: it also carries the wish to stop.
        with suppress(OSError):
            write_json(self._folder.progress, {**self.state, "time": time.time()})

    def _beat(self) -> None:
        stop_file = self._folder.stop_file(self._attempt)
        beats = 0
        while not self._ended.wait(PERIOD_S):
            beats += 1
            self._look_for_stall()
            self._pass_on_a_notice(stop_file)
            if self._stage is not None and beats % _EVERY == 0:
                self._write_stage(*self._stage)
            if self._context.rank == 0:
                self._write()
                self._stop_seen = self._stop_seen or stop_file.exists()
            elif self._context.stop_requested():
                with suppress(OSError):  # a full disk; tried again at the next beat
                    stop_file.touch()

    def _pass_on_a_notice(self, stop_file: Path) -> None:
        what = self._context.preemption()
        if what is not None and not stop_file.exists():
            notice = self._folder.notice_file(self._attempt)
            with suppress(OSError):
                notice.parent.mkdir(parents=True, exist_ok=True)
                write_json(notice, {"rank": self._context.rank, "what": what})
                stop_file.touch()

    def _write_stage(self, index: int, look: Callable[[], StageTimes]) -> None:
        """The fractions since the last look that saw a step."""
        now = replace(look())
        # At the end of an epoch the clocks begin anew.
        before = self._clocks if now.wall_s >= self._clocks.wall_s else StageTimes()
        if now.wall_s <= before.wall_s:
            return
        self._clocks = now
        spent = StageTime(
            layers=(0, 0),
            replicas=1,
            wall_s=now.wall_s - before.wall_s,
            wait_input_s=now.wait_input_s - before.wait_input_s,
            wait_output_s=now.wait_output_s - before.wait_output_s,
            all_reduce_s=now.wait_replicas_s - before.wait_replicas_s,
        )
        path = self._folder.stage_file(index)
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"attempt": self._attempt, "step": self.state["step"], **fractions(spent)})

    def _look_for_stall(self) -> None:
        now, place = time.monotonic(), (self.state.get("phase"), self.state["step"])
        if place != self._last:
            self._last, self._since = place, now
        elif place[0] == "train" and now - self._since > self._stall_s:
            self._since = float("inf")
            path = self._folder.stacks_file(self._attempt, self._context.rank)
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "w", encoding="utf-8") as file:
                    file.write(f"rank {self._context.rank}: no step since step {place[1]}\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
