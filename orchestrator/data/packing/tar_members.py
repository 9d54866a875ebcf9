"""The members of a tar, believed only when the tar is whole: a plain reader takes damage for the end."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator

from orchestrator.errors import DataError


class Window(io.RawIOBase):
    """A part of an open file as a file of its own; reads exactly what is asked for."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self.start, self.size = start, size
        self._descriptor, self._at = descriptor, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self.size - self._at))
        data = os.pread(self._descriptor, wanted, self.start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def whole_file(descriptor: int) -> Window:
    """All of an open file."""
    return Window(descriptor, 0, os.fstat(descriptor).st_size)


def members(window: Window, where: str) -> Iterator[tarfile.TarInfo]:
    """Every member in order; `offset_data` counts from the window's start. Constant memory.

    Raises DataError, naming `where` and the byte, when the tar does not go on to its end mark.
    """
    count = 0
    try:
        with tarfile.open(fileobj=window, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # tarfile would keep a million of them
                count += 1
                yield member
            end = tar.offset
    except tarfile.TarError as error:
        after = f" after {count} members" if count else ""
        raise DataError(f"{where}: is not a tar that can be read{after}: {error}") from None
    window.seek(end)
    if window.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"{where}: is damaged or cut at byte {end} of the tar, after {count} members: the end mark of a tar is "
            "missing there; get the file again"
        )
