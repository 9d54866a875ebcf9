"""Turn the first SIGINT, SIGTERM or SIGUSR1 into a wish to stop; the second leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from orchestrator.errors import EXIT_INTERRUPTED

_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_LATER_S = 0.02
_PATIENCE_S = 60.0
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
        self.received = name
        self._on_stop(name)


@contextmanager
def interrupting() -> Iterator[None]:
    """SIGTERM and SIGUSR1 are KeyboardInterrupt as SIGINT is, until a StopSignal takes them; the second leaves at once.

    Under torchrun they stay as they are: a rank that waits for another one in C would never hear of them.
    """
    told = postponed = False

    def leave() -> None:
        # An interruption that a library swallowed, or that met the locks of two imports, is waited for in vain.
        if signal.getsignal(signal.SIGTERM) is interrupt:
            print(INTERRUPTED, file=sys.stderr, flush=True)
            os._exit(EXIT_INTERRUPTED)

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal told, postponed
        if told and not postponed:
            os._exit(128 + number)
        if not told:
            last = threading.Timer(_PATIENCE_S, leave)
            last.daemon = True
            last.start()
        told, postponed = True, frame is not None and frame.f_code.co_filename.startswith("<frozen importlib")
        if not postponed:
            raise KeyboardInterrupt
        # Raised there it can be lost with a lock that all imports of all threads then wait for.
        later = threading.Timer(_LATER_S, os.kill, [os.getpid(), number])
        later.daemon = True
        later.start()

    mine = threading.current_thread() is threading.main_thread() and "LOCAL_RANK" not in os.environ
    before = {number: signal.signal(number, interrupt) for number in (_WATCHED if mine else ())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
