"""Files that a reader sees whole or not at all, and locks that end with their process."""

from __future__ import annotations

import argparse
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_WAIT_S = 0.2


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write so that a reader sees the old file or the new one, never a part; threads may write at once.

    Raises OSError, a full disk among others, and leaves nothing behind then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file is the one at `path`: a lock on what has no name any more keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def result_file(text: str) -> Path:
    """The path of a file that a command is to write, for argparse: refused before hours of work end in it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a folder that is there and can be written, got {text}")
    return path


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
                mine = is_at(file, path)
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
