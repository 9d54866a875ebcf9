"""Follows one attempt through the files of its run folder, in a thread of the driver."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from orchestrator.job.show import counted
from orchestrator.run.folder import RunFolder, read_json
from orchestrator.show.display import display_for
from orchestrator.show.snapshot import Snapshot, StageShare
from orchestrator.show.terminal import duration, layers_text, percent

_POLL_S = 0.25
# Of so many looks at the progress the rate is the mean: some ten seconds.
_LOOKS = 40


class Follower:
    """Shows what happens in an attempt: its lines as they come, and where it is now."""

    def __init__(self, run_dir: Path, attempt: int, out: TextIO | None = None, since: int | None = None) -> None:
        """`since` is the offset of the attempt's first event; default: the next one."""
        self._attempt = attempt
        self._folder = RunFolder(run_dir)
        earlier, end = self._folder.read_events()
        self._offset = end if since is None else since
        plans = [event for event in earlier if event["event"] == "plan"]
        self._stages = stage_names(plans[-1]) if plans else []
        self._display = display_for(out or sys.stdout)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._start: dict[str, Any] = {}
        self._began: tuple[float, int] | None = None
        self._looks: deque[tuple[float, int]] = deque(maxlen=_LOOKS)
        self._best = ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        try:
            while not self._ended.wait(_POLL_S):
                self._look()
            self._look()
        finally:
            self._display.close()

    def _look(self) -> None:
        events, self._offset = self._folder.read_events(self._offset)
        for event in events:
            line = self._line(event)
            if line:
                self._display.line(line)
        snapshot = self._snapshot()
        if snapshot is not None:
            self._display.progress(snapshot)

    def _line(self, event: dict[str, Any]) -> str | None:
        kind = event["event"]
        if kind == "start":
            self._start = event
            self._began = (time.monotonic(), event["step"])
            return (
                f"Training {counted(event['steps_total'] - event['step'], 'step')}, "
                f"{counted(event['epochs'], 'epoch')} of {event['samples_per_epoch']} images"
                f"{_loader(event.get('loader'))}"
            )
        if kind == "first_step":
            return first_step_line(event)
        if kind == "epoch":
            return self._epoch_line(event)
        if kind == "warning":
            return f"warning: {event['text']}"
        return None

    def _epoch_line(self, event: Mapping[str, Any]) -> str:
        layers = event["layer_val_top1"]
        accuracy = ""
        if layers:
            best = max(range(len(layers)), key=layers.__getitem__)
            self._best = f"val {percent(event['val_top1'])}, best layer {best} {percent(layers[best])}"
            accuracy = f"  val {percent(event['val_top1'])} (layers {' '.join(f'{100 * a:.1f}' for a in layers)})"
        losses = [x for x in event["train_loss"] if x is not None]
        loss = f"  loss {losses[-1]:.3f}" if losses else ""
        seconds = self._left(event["step"])
        left = "" if seconds is None else f"  {duration(seconds)} left"
        return (
            f"epoch {event['epoch']:>3}/{self._start.get('epochs', '?')}  step {event['step']:>6}"
            f"  {event['images_per_second']:>7.0f} images/s{loss}{accuracy}{left}"
        )

    def _left(self, step: int) -> float | None:
        """Seconds to the last step at the mean speed of this attempt; None where that is not known."""
        if self._began is None or step <= self._began[1]:
            return None
        began, first = self._began
        remaining = self._start["steps_total"] - step
        return (time.monotonic() - began) / (step - first) * remaining if remaining > 0 else None

    def _snapshot(self) -> Snapshot | None:
        progress = self._read(self._folder.progress)
        if progress is None or not progress.get("steps_total"):
            return None
        step = int(progress["step"])
        return Snapshot(
            step=step,
            steps_total=int(progress["steps_total"]),
            phase=str(progress.get("phase", "train")),
            images_per_second=self._rate(step),
            seconds_left=self._left(step),
            best=self._best,
            stages=tuple(self._shares()),
        )

    def _rate(self, step: int) -> float | None:
        """Images per second of late; None before steps have been seen."""
        self._looks.append((time.monotonic(), step))
        (then, first), (now, last) = self._looks[0], self._looks[-1]
        if not self._start or last <= first:
            return None
        return (last - first) / (now - then) * float(self._start["samples_per_epoch"] / self._start["steps_per_epoch"])

    def _shares(self) -> list[StageShare]:
        found = []
        for index, name in enumerate(self._stages):
            values = self._read(self._folder.stage_file(index))
            if values is not None:
                keys = ("busy", "wait_input", "wait_output", "all_reduce")
                found.append(StageShare(name, *(float(values[f"{key}_fraction"]) for key in keys)))
        return found

    def _read(self, path: Path) -> dict[str, Any] | None:
        """What this attempt wrote there; None before it did."""
        try:
            values: dict[str, Any] | None = read_json(path)
        except (OSError, ValueError):  # shared storage may show half a file for a moment
            return None
        return None if values is None or values.get("attempt") != self._attempt else values


def stage_names(plan: Mapping[str, Any]) -> list[str]:
    """What stages are called beside their bars: number, layers, replicas where there are several."""
    found = []
    for stage in plan["stages"]:
        replicas = f" x{stage['replicas']}" if stage["replicas"] > 1 else ""
        found.append(f"stage {stage['index']}  {layers_text(stage, plan['layer_names'])}{replicas}")
    return found


def first_step_line(event: Mapping[str, Any]) -> str:
    """How long it took from the command to the first step, and where that time went."""
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in event["seconds"].items())
    return f"First step after {sum(event['seconds'].values()):.1f} s: {parts}"


def _loader(loader: Mapping[str, Any] | None) -> str:
    if not loader:
        return ""
    where = {0: "in the training thread", 1: "1 loader thread a worker"}
    said = where.get(loader["threads"], f"{loader['threads']} loader threads a worker")
    return f"; decoder {loader['decoder']}, {said}"
