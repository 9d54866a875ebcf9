"""A run on its way: bars in a terminal, plain lines in a file, and the same bars from the log of a far driver."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
from rich.console import Console

from orchestrator.show import display
from orchestrator.show.display import Bars, Lines, Records, Tail, bars, display_for
from orchestrator.show.snapshot import Snapshot, StageShare, from_record

STAGES = (
    StageShare("stage 0  conv0 .. conv1", 0.5, 0.375, 0.125, 0.0),
    StageShare("stage 1  conv2 x2", 0.25, 0.7, 0.001, 0.049),
)
NOW = Snapshot(540, 2700, "train", 2159.4, 42.0, "val 91.00 %, best layer 1 93.56 %", STAGES)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Kept:
    """A display that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.snapshots: list[Snapshot] = []
        self.closed = False

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def close(self) -> None:
        self.closed = True


def drawn(snapshot: Snapshot, *, most: int = 9, width: int = 120) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(bars(snapshot, most=most))
    return [" ".join(line.translate(str.maketrans("", "", "━╸╺")).split()) for line in out.getvalue().splitlines()]


def test_bars_say_how_far_how_fast_how_good_how_long_and_what_each_stage_does() -> None:
    assert drawn(NOW) == [
        "step 540/2700 train 2159 images/s 42 s left val 91.00 %, best layer 1 93.56 %",
        "stage 0 conv0 .. conv1 50 % busy, waits 38 % for input, 12 % for output",
        "stage 1 conv2 x2 25 % busy, waits 70 % for input, 5 % for its replicas",
    ]
    assert "2159 images/s 42 s left" in drawn(NOW, width=80)[0], "a narrow terminal cuts off the accuracy"
    assert drawn(Snapshot(0, 2700, "train")) == ["step 0/2700 train"], "nothing of what is not known yet"


def test_of_more_stages_than_there_are_rows_the_busiest_are_shown_in_their_order() -> None:
    many = tuple(StageShare(f"s{i}", busy, 0.0, 0.0, 0.0) for i, busy in enumerate((0.2, 0.9, 0.1, 0.8)))
    rows = drawn(replace(NOW, stages=many), most=2)[1:]
    assert [row.split()[0] for row in rows] == ["s1", "s3", "and"]
    assert rows[-1] == "and 2 stages that are less busy"


def test_a_terminal_gets_bars_and_keeps_only_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    shown = display_for(out)
    assert isinstance(shown, Bars)
    shown.progress(NOW)
    assert "step 540/2700" in out.getvalue()
    shown.line("warning: [red] is text, not a colour")
    assert "warning: [red] is text, not a colour\n" in out.getvalue()
    shown.close()
    after = out.getvalue().rpartition("540/2700")[2]
    assert "\x1b[2K" in after, "the bars are erased"
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1, "the cursor comes back"


@pytest.mark.parametrize(
    ("term", "tty", "watched", "kind"),
    [
        ("dumb", True, False, Lines),
        ("xterm", False, False, Lines),
        ("xterm", False, True, Records),
        ("xterm", True, True, Bars),
    ],
)
def test_what_is_no_terminal_gets_lines_or_the_records_that_somebody_asked_for(
    term: str, tty: bool, watched: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv(display.WATCHED, raising=False)
    if watched:
        monkeypatch.setenv(display.WATCHED, "1")
    shown = display_for(Terminal() if tty else io.StringIO())
    shown.close()
    assert type(shown) is kind


def test_a_file_gets_a_line_of_progress_only_when_nothing_was_said_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    lines = Lines(out)
    for seconds, said in ((29, ""), (31, "step 540 of 2700, train  42 s left\n"), (60, ""), (62, "again")):
        now[0] = 1000.0 + seconds
        out.seek(0)
        out.truncate()
        lines.progress(NOW)
        assert bool(out.getvalue()) is bool(said)
        if said.startswith("step"):
            assert out.getvalue() == said


def test_a_snapshot_is_the_same_after_its_way_through_a_line_and_nothing_else_is_one() -> None:
    assert from_record(NOW.to_record()) == NOW
    assert "\n" not in NOW.to_record()
    for line in ("epoch 1", "", "\x1e{", '\x1e{"step": 1}', '\x1e{"unknown": 1, "stages": []}'):
        assert from_record(line) is None


def test_a_log_in_pieces_of_any_size_gives_the_same_lines_and_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "_RECORD_S", 0.0)
    out = io.StringIO()
    far = Records(out)
    far.line("Training 2700 steps")
    far.progress(NOW)
    far.line("epoch 1")
    log = out.getvalue() + "no end"
    for size in (1, 7, 50, len(log)):
        kept = Kept()
        tail = Tail(kept)
        for start in range(0, len(log), size):
            tail.feed(log[start : start + size])
        tail.close()
        assert kept.lines == ["Training 2700 steps", "epoch 1", "no end"]
        assert kept.snapshots == [NOW]
        assert kept.closed
