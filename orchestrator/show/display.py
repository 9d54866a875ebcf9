"""Three ways to show a run that goes on: moving bars in a terminal, lines in a file, records for another program."""

from __future__ import annotations

import os
import sys
import time
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.show.snapshot import Snapshot, StageShare, from_record
from orchestrator.show.terminal import duration

# Set by `submit` where somebody watches: the driver sends records for the bars on their side.
WATCHED = "ORCHESTRATOR_WATCHED"

_HEARTBEAT_S = 30.0
_RECORD_S = 2.0
_BAR = 30


class Display(Protocol):
    """Takes lines that stay and snapshots that replace one another."""

    def line(self, text: str) -> None:
        """Show a line for good."""

    def progress(self, snapshot: Snapshot) -> None:
        """Show where the run is now."""

    def close(self) -> None:
        """Leave nothing behind but the lines."""


def display_for(out: TextIO) -> Display:
    """What fits the place that the text goes to."""
    if out.isatty() and os.environ.get("TERM") != "dumb":
        return Bars(out)
    return Records(out) if WATCHED in os.environ else Lines(out)


class Lines:
    """Plain text; a line of progress when nothing was said for long."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._last = time.monotonic()

    def line(self, text: str) -> None:
        print(text, file=self._out, flush=True)
        self._last = time.monotonic()

    def progress(self, snapshot: Snapshot) -> None:
        if time.monotonic() - self._last >= _HEARTBEAT_S:
            self.line(f"step {snapshot.step} of {snapshot.steps_total}, {snapshot.phase}{_left(snapshot)}")

    def close(self) -> None:
        return None


class Records(Lines):
    """Plain text with a record every few seconds; `Tail` takes them apart."""

    def progress(self, snapshot: Snapshot) -> None:
        if time.monotonic() - self._last >= _RECORD_S:
            self.line(snapshot.to_record())


class Bars:
    """Lines that scroll away above bars that stay at the bottom of a terminal."""

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False, markup=False, emoji=False)
        # What others print meanwhile (a signal's answer) goes above the bars, unless it goes elsewhere anyway.
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=out is sys.stdout,
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()

    def line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def progress(self, snapshot: Snapshot) -> None:
        rows = self._console.size.height - 4
        self._live.update(bars(snapshot, most=max(rows, 2)), refresh=True)

    def close(self) -> None:
        self._live.stop()


class Tail:
    """The log of a driver elsewhere, in pieces as they come: its lines and records to a display here."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._rest = ""

    def feed(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._show(line)

    def close(self) -> None:
        """Show a last line without an end, and close the display."""
        if self._rest:
            self._show(self._rest)
        self._rest = ""
        self._display.close()

    def _show(self, line: str) -> None:
        snapshot = from_record(line)
        if snapshot is None:
            self._display.line(line)
        else:
            self._display.progress(snapshot)


def bars(snapshot: Snapshot, *, most: int) -> RenderableType:
    """The run in one row, then a row for each stage, for the busiest ones where there are more than `most`."""
    whole = Table.grid(padding=(0, 2))
    facts = [f"step {snapshot.step}/{snapshot.steps_total}", snapshot.phase]
    facts += [] if snapshot.images_per_second is None else [f"{snapshot.images_per_second:.0f} images/s"]
    # A narrow terminal cuts the end off, and the accuracy stands in the lines above.
    facts += [_left(snapshot).strip()] if _left(snapshot) else []
    facts += [snapshot.best] if snapshot.best else []
    done = ProgressBar(total=snapshot.steps_total, completed=snapshot.step, width=_BAR)
    whole.add_row(done, Text("  ".join(facts), no_wrap=True, overflow="ellipsis"))
    stages = Table.grid(padding=(0, 2))
    shown = _busiest(snapshot.stages, most)
    for stage in shown:
        bar = ProgressBar(total=1.0, completed=min(stage.busy, 1.0), width=_BAR // 2)
        stages.add_row(Text(stage.name, no_wrap=True, overflow="ellipsis"), bar, Text(_shares(stage), no_wrap=True))
    left_out = len(snapshot.stages) - len(shown)
    more = [Text(f"and {left_out} stages that are less busy")] if left_out else []
    return Group(whole, *([stages] if shown else []), *more)


def _busiest(stages: tuple[StageShare, ...], most: int) -> list[StageShare]:
    """In their own order."""
    kept = sorted(range(len(stages)), key=lambda i: -stages[i].busy)[:most]
    return [stages[i] for i in sorted(kept)]


def _shares(stage: StageShare) -> str:
    waits = [
        (stage.wait_input, "for input"),
        (stage.wait_output, "for output"),
        (stage.all_reduce, "for its replicas"),
    ]
    told = [f"{100 * share:.0f} % {what}" for share, what in waits if share >= 0.005]
    return f"{100 * stage.busy:3.0f} % busy" + (f", waits {', '.join(told)}" if told else "")


def _left(snapshot: Snapshot) -> str:
    return "" if snapshot.seconds_left is None else f"  {duration(snapshot.seconds_left)} left"
