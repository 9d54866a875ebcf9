"""What the driver does beside an attempt: show and track its progress, and carry the wish to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from orchestrator.errors import Interrupted, first_line
from orchestrator.launch.signals import StopSignal
from orchestrator.run.folder import RunFolder, read_json
from orchestrator.run.records import tracking
from orchestrator.show.follow import Follower


@contextmanager
def interruptible(folder: RunFolder) -> Iterator[None]:
    """Ctrl-C where no attempt is there to turn it into a wish to stop. Raises Interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        if not (read_json(folder.progress) or {}).get("step"):
            raise Interrupted(
                "interrupted before the first step; nothing is lost, the same command starts again"
            ) from None
        raise Interrupted("interrupted; what was saved is kept, the same command goes on from there") from None


@contextmanager
def failure_kept(folder: RunFolder) -> Iterator[None]:
    """An error that ends the run is written down, for whoever looks at the run later; a stop is none."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        # A full disk is no reason to hide what came first.
        with suppress(OSError):
            folder.write_failure(first_line(error))
        raise


@contextmanager
def followed(
    folder: RunFolder, attempt: int, uri: str, run_id: str, out: TextIO | None, since: int | None
) -> Iterator[None]:
    """Show progress and send metrics to MLflow, from the files that the attempt's rank 0 writes.

    `since` is where its events begin, where it is not now.
    """
    follower = Follower(folder.path, attempt, out, since)
    sink = tracking.EventSink(uri, run_id, folder.path)
    follower.start()
    sink.start()
    try:
        yield
    finally:
        sink.stop()
        follower.stop()


@contextmanager
def stoppable(
    folder: RunFolder, attempt: int, max_hours: float | None, say: Callable[[str], None]
) -> Iterator[threading.Event]:
    """First signal: save and leave. When `max_hours` are over the same. What is yielded says whether that was asked."""
    stop_file, asked = folder.stop_file(attempt), threading.Event()

    def stop(reason: str) -> None:
        asked.set()
        stop_file.touch()
        # Whoever asks to stop does not want another attempt.
        folder.notice_file(attempt).unlink(missing_ok=True)
        progress = read_json(folder.progress) or {}
        makes_steps = progress.get("attempt") == attempt and progress.get("steps_total")
        then = (
            "saving at the end of this step, then leaving"
            if makes_steps
            else "stopping as soon as the workers are there"
        )
        say(f"{reason}: {then} (again: leave at once)")

    timer = None
    if max_hours is not None:
        timer = threading.Timer(max_hours * 3600, stop, ["train.max_hours is over"])
        timer.daemon = True
        timer.start()
    try:
        with StopSignal(stop):
            yield asked
    finally:
        if timer is not None:
            timer.cancel()
        stop_file.unlink(missing_ok=True)
