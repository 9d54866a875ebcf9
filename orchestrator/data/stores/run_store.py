"""Objects of runs in a store: written whole, replaced on condition, listed and deleted, each try within a limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import obstore
from obstore import exceptions

from orchestrator.data.stores.remote import Passing, Patience, Remote
from orchestrator.errors import JobError, OrchestratorError

T = TypeVar("T")

_LISTED = 1000


@dataclass(frozen=True)
class Tag:
    """Which version of an object it is; stores use one of the two or both."""

    e_tag: str | None
    version: str | None


@dataclass(frozen=True)
class Stored:
    """An object as a listing has it."""

    bytes: int
    tag: Tag


class RunStore(Remote):
    """The objects below one URL, by name.

    Raises JobError for what is not allowed or not there for good, OrchestratorError for a store that does not answer
    within `limit_s` seconds from the first failure on, or as often as `patience` says.
    """

    _refusal = JobError
    _silence = OrchestratorError
    _doing = "reading and writing"
    _absent = "create the bucket, or correct the address"
    _changed = "another process replaced it at this moment: run the same command again"

    def __init__(self, url: str, patience: Patience | None = None, limit_s: float = float("inf")) -> None:
        super().__init__(url, patience=patience)
        self._limit_s = limit_s

    def put(self, name: str, content: bytes | Path) -> Tag:
        """Write an object: until the last byte is there, it is what it was before."""
        if isinstance(content, Path):
            content.stat()  # a file that is missing here must not read as a bucket that is missing there
        return _tag(self._tried(name, lambda: obstore.put(self._opened(), name, content)))

    def create(self, name: str, content: bytes) -> Tag | None:
        """Write a new object; None when there is one of this name."""
        return self._if(name, content, "create")

    def replace(self, name: str, content: bytes, tag: Tag) -> Tag | None:
        """Write an object that is still the version `tag`; None when it is not."""
        known = {"e_tag": tag.e_tag, "version": tag.version}
        return self._if(name, content, {key: value for key, value in known.items() if value is not None})

    def _if(self, name: str, content: bytes, mode: Literal["create"] | dict[str, str]) -> Tag | None:
        def once() -> Tag | None:
            try:
                return _tag(obstore.put(self._opened(), name, content, mode=mode))
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return None

        try:
            return self._tried(name, once)
        except JobError:
            # An object to replace that is gone, or a bucket that never was.
            if mode != "create" and self.get(name) is None:
                return None
            raise

    def get(self, name: str) -> tuple[bytes, Tag] | None:
        """The content of a small object; None when there is none."""

        def once() -> tuple[bytes, Tag] | None:
            try:
                result = obstore.get(self._opened(), name)
                return bytes(result.bytes()), _tag(result.meta)
            except FileNotFoundError:
                return None

        return self._tried(name, once)

    def fetch(self, name: str, where: Path, size: int) -> None:
        """Bring an object of `size` bytes into the file `where`, taken up again where it is cut."""
        with open(where, "wb") as file:
            self.append(name, file, size)

    def listed(self, folder: str) -> dict[str, Stored]:
        """All objects in a folder and below, by their names in it."""

        def once() -> dict[str, Stored]:
            chunks = obstore.list(self._opened(), folder, chunk_size=_LISTED)
            return {
                meta["path"].removeprefix(f"{folder}/"): Stored(meta["size"], _tag(meta))
                for chunk in chunks
                for meta in chunk
            }

        return self._tried(folder, once)

    def folders(self) -> list[str]:
        """The names of the folders directly below the URL, sorted."""

        def once() -> list[str]:
            found = obstore.list_with_delimiter(self._opened())["common_prefixes"]
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

        return self._tried("", once)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, in this order where they are many; those that are gone already are none too many."""
        for chunk in _chunks(list(names)):
            self._tried(chunk[0], partial(self._deleted, chunk))

    def _deleted(self, names: list[str]) -> None:
        try:
            obstore.delete(self._opened(), names)
        except FileNotFoundError:
            return

    def move(self, folder: str, target: str) -> None:
        """Give a folder another name. Objects are copied within the store, then deleted."""
        names = sorted(self.listed(folder))
        for name in names:
            self._tried(name, partial(obstore.copy, self._opened(), f"{folder}/{name}", f"{target}/{name}"))
        self.delete(f"{folder}/{name}" for name in names)

    def _tried(self, name: str, once: Callable[[], T]) -> T:
        """What `once` returns, tried again after failures that may pass."""
        failures, began = 0, time.monotonic()
        while True:
            try:
                return once()
            except (exceptions.BaseError, OSError) as error:
                judged = self._judged(name, error)
                if not isinstance(judged, Passing):
                    raise judged from None
                failures += 1
                late = time.monotonic() - began > self._limit_s
                self._pause(name, self._patience.attempts if late else failures, str(judged), None)


def _tag(found: Any) -> Tag:
    return Tag(found.get("e_tag"), found.get("version"))


def _chunks(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), _LISTED):
        yield names[start : start + _LISTED]
