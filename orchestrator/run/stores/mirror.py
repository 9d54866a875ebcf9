"""The small files of a run, here and in its store: what changed on one side is brought to the other."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.data.stores.run_store import RunStore
from orchestrator.errors import OrchestratorError
from orchestrator.run.folder import RunFolder, read_json, write_atomically, write_json

PERIOD_S = 5.0
# Job, progress, events, results, reports of failures, wishes to stop; no dot files, and nothing that users export.
_SMALL = re.compile(r"(failures/)?[A-Za-z0-9][^/]*\.(json|jsonl|yaml|svg|md|py|stacks)|stop-\d+")
# What this machine knows of the store: lies beside the files and is never uploaded.
_KNOWN = ".store.json"


class Mirror:
    """The small files of the run `name` in `store` and in `folder`; threads may call it at once.

    A file here is known by its time and size, one in the store by its tag. Where a file changed on both sides since
    the last look the store has it, because only one side writes a file at a time. Raises what RunStore raises, and
    OSError for the disk here.
    """

    def __init__(self, store: RunStore, name: str, folder: RunFolder) -> None:
        self._store, self._name, self._folder = store, name, folder
        self._lock = threading.Lock()
        saved: dict[str, Any] = read_json(folder.path / _KNOWN) or {}
        self._known: dict[str, tuple[list[int], str | None]] = {k: (v[0], v[1]) for k, v in saved.items()}

    def push(self, only: str = "") -> None:
        """Bring what changed here, and begins with `only`, to the store."""
        with self._lock:
            self._push(only)

    def pull(self) -> None:
        """Bring what changed in the store here."""
        with self._lock:
            self._pull()

    def both(self) -> None:
        """Bring what changed there here, then what changed here there."""
        with self._lock:
            self._pull()
            self._push("")

    def renew(self) -> None:
        """Have what the store has here and nothing else: the files that are here are of another time."""
        with self._lock:
            there = self._store.listed(self._name)
            for path, name in list(self._files()):
                if name not in there or name not in self._known or self._known[name][0] != _stamp(path):
                    path.unlink()
                    self._known.pop(name, None)
            self._pull()

    def _push(self, only: str) -> None:
        changed = False
        here = list(self._files())
        for name in self._known.keys() - {name for _, name in here}:
            if not only and name.startswith("stop-"):  # the wish was granted
                self._store.delete([f"{self._name}/{name}"])
                del self._known[name]
        for path, name in here:
            if not name.startswith(only):
                continue
            with suppress(FileNotFoundError):  # replaced or removed at this moment
                stamp = _stamp(path)
                if name in self._known and self._known[name][0] == stamp:
                    continue
                content = path.read_bytes()
                self._known[name] = (stamp, self._store.put(f"{self._name}/{name}", content).e_tag)
                changed = True
        self._remember(changed)

    def _pull(self) -> None:
        changed = False
        for name, stored in self._store.listed(self._name).items():
            if not _SMALL.fullmatch(name) or (name in self._known and self._known[name][1] == stored.tag.e_tag):
                continue
            found = self._store.get(f"{self._name}/{name}")
            if found is not None:
                path = self._folder.path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, found[0])
                self._known[name] = (_stamp(path), found[1].e_tag)
                changed = True
        self._remember(changed)

    def _files(self) -> Iterator[tuple[Path, str]]:
        for path in (*self._folder.path.glob("*"), *self._folder.path.glob("failures/*")):
            name = path.relative_to(self._folder.path).as_posix()
            if _SMALL.fullmatch(name) and path.is_file():
                yield path, name

    def _remember(self, changed: bool) -> None:
        if changed:
            write_json(self._folder.path / _KNOWN, self._known)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_mtime_ns, stat.st_size]


class Beside:
    """Calls `look` every few seconds in a thread while the block lasts; `say` hears of a store that does not answer."""

    def __init__(self, look: Callable[[], None], say: Callable[[str], None]) -> None:
        self._look, self._say = look, say
        self._ended = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(PERIOD_S):
            try:
                self._look()
                self._told = False
            except (OrchestratorError, OSError) as error:
                if not self._told:
                    self._told = True
                    self._say(f"warning: {error}; progress and events wait here until it does")
