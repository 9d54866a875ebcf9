"""Turn the first SIGINT, SIGTERM or SIGUSR1 into a wish to stop; the second leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from orchestrator.errors import EXIT_INTERRUPTED

_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_LATER_S = 0.02
_PATIENCE_S = 60.0
# The signals that interrupted this command so far: who is told of one ends it, or there is a StopSignal.
_told: list[str] = []
INTERRUPTED = "interrupted; the same command starts again, or goes on from what was saved"


class StopSignal:
    """Installed around a run; `on_stop` is called once, inside the handler.

    Signals belong to the main thread: a run in another one, a trial of a search, is stopped by its file alone.
    """

    def __init__(self, on_stop: Callable[[str], None]) -> None:
        self._on_stop = on_stop
        self._previous: dict[signal.Signals, Any] = {}
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        watched = _WATCHED if threading.current_thread() is threading.main_thread() else ()
        for number in watched:
            self._previous[number] = signal.signal(number, self._handle)
        if watched and _told:  # an interruption that a library swallowed
            self._take(_told[0])
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            shown = "\x1b[?25h" if os.isatty(2) else ""  # the cursor, which moving bars hide
            os.write(2, f"{shown}\n{name} again: leaving at once; the last saved checkpoint counts\n".encode())
            os._exit(128 + number)
        self._take(name)

    def _take(self, name: str) -> None:
        self.received = name
        self._on_stop(name)


@contextmanager
def interrupting() -> Iterator[None]:
    """SIGTERM and SIGUSR1 are KeyboardInterrupt as SIGINT is, until a StopSignal takes them; the second leaves at once.

    Under torchrun they stay as they are: a rank that waits for another one in C would never hear of them.
    """
    postponed = False
    # A handler may use it at any moment; to start a thread it would need locks that what it interrupts may hold.
    heard: SimpleQueue[int | None] = SimpleQueue()

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal postponed
        if _told and not postponed:
            os._exit(128 + number)
        _told.append(signal.Signals(number).name)
        postponed = frame is not None and frame.f_code.co_filename.startswith("<frozen importlib")
        heard.put(number if postponed else 0)
        if not postponed:
            raise KeyboardInterrupt

    def watch() -> None:
        number, until = heard.get(), time.monotonic() + _PATIENCE_S
        while number is not None:
            if number:  # raised there it could be lost with a lock that all imports of all threads then wait for
                time.sleep(_LATER_S)
                os.kill(os.getpid(), number)
            try:
                number = heard.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
        # An interruption that a library swallowed, or that met the locks of two imports, is waited for in vain.
        if number is not None and signal.getsignal(signal.SIGTERM) is interrupt:
            print(INTERRUPTED, file=sys.stderr, flush=True)
            os._exit(EXIT_INTERRUPTED)

    mine = threading.current_thread() is threading.main_thread() and "LOCAL_RANK" not in os.environ
    _told.clear()
    threading.Thread(target=watch, name="interruption", daemon=True).start()
    before = {number: signal.signal(number, interrupt) for number in (_WATCHED if mine else ())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _told.clear()
        heard.put(None)


@contextmanager
def held_back() -> Iterator[None]:
    """A signal counts at the end of the block, the second one leaves at once.

    For seconds that must not be cut short: an import may swallow an interruption, or leave half a library behind.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            os._exit(128 + number)
        noted.append(number)

    mine = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (_WATCHED if mine else ())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if noted:
            os.kill(os.getpid(), noted[0])


@contextmanager
def kept_handlers() -> Iterator[None]:
    """A library may handle SIGTERM while the block lasts, by ending the process; then it is ours again."""
    mine = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def beside_main_thread(call: Callable[[], object], name: str) -> None:
    """Run `call` in a thread of its own and wait for its end; what it raises is raised here."""
    begun_beside(call, name)()


def begun_beside(call: Callable[[], object], name: str) -> Callable[[], None]:
    """Begin `call` in a thread of its own. What is returned waits for its end, and raises what it raised.

    Ray Train and Ray Tune take over signals when they run in the main thread, and would abort without a checkpoint.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()

    def wait() -> None:
        while thread.is_alive():
            # A join without a limit would keep the handlers of signals from running.
            thread.join(0.2)
        if failure:
            raise failure[0]

    return wait
