"""Files that a reader sees whole or not at all, and locks that end with their process."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_WAIT_S = 0.2


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write so that a reader sees the old file or the new one, never a part; threads may write at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def alone(path: Path, stopped: Callable[[], bool], waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock file `path` for this process; ends with it, however that ends. False when `stopped` meanwhile.

    `waiting` is called once when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        with open(path, "a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The holder before removed the file: a lock on what has no name keeps nobody out.
                mine = path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
            except BlockingIOError:
                mine = False
                if not told:
                    waiting()
                    told = True
            if mine:
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                return
        if stopped():
            yield False
            return
        time.sleep(_WAIT_S)
