"""What a command started: every process below it, seen while it runs, so that none is left when it has ended."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on at this moment, all different."""
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def parent_of(process: int) -> int:
    return int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])


def _table() -> dict[int, tuple[int, str, str]]:
    """Parent, time of start and name of every process of this machine, by process id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name, _, rest = (folder / "stat").read_text().rpartition(")")
                command = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            fields = rest.split()
            if fields[0] != "Z":
                found[int(folder.name)] = (int(fields[1]), fields[19], command or name.partition("(")[2])
    return found


def workers(driver: int) -> list[int]:
    """Process ids of the driver's workers, in order of rank: forked by a server that the driver started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
                grandparent = parent_of(parent_of(int(folder.name)))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if grandparent == driver and b"multiprocessing.forkserver" in command:
                found.append(int(folder.name))
    return sorted(found)


class Descendants:
    """Watches the process `root` and all that it starts, also what outlives its parent.

    A process is known by its id and its time of start, because ids come again.
    """

    def __init__(self, root: int) -> None:
        self._ids = {root}
        self._ended = threading.Event()
        self.seen: dict[tuple[int, str], str] = {}
        self.names: dict[tuple[int, str], set[str]] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Descendants:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            table = _table()
            size = 0
            while size != len(self._ids):  # children of children, whatever the order of their numbers
                size = len(self._ids)
                self._ids |= {pid for pid, (parent, _, _) in table.items() if parent in self._ids}
            now = {(pid, table[pid][1]): table[pid][2] for pid in self._ids if pid in table}
            self.seen |= now
            for process, name in now.items():
                self.names.setdefault(process, set()).add(name)

    def count(self, beginning: str) -> int:
        """How many processes ever had a name with this beginning; Ray's workers change theirs, last while they end."""
        return sum(any(name.startswith(beginning) for name in names) for names in self.names.values())

    def left(self, within_s: float = 15) -> list[str]:
        """Names of those that still run after that time; the test's own process is none of them."""
        until = time.monotonic() + within_s
        while True:
            table = _table()
            alive = [
                name
                for (pid, started), name in self.seen.items()
                if pid != os.getpid() and pid in table and table[pid][1] == started
            ]
            if not alive or time.monotonic() > until:
                return alive
            time.sleep(0.2)
