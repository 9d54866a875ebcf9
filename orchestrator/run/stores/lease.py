"""One driver per run wherever it is: an object in the store that counts for as long as its driver renews it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from orchestrator.data.stores.run_store import RunStore, Tag
from orchestrator.errors import OrchestratorError

BEAT_S = 10.0
STALE_S = 45.0
_LOOK_S = 1.0


class StoreLease:
    """The right to drive the run `name` in `store`; `token` is the number that fences off older drivers.

    A lease whose process is dead on this machine is stale at once; another one when it was not renewed for `stale_s`
    by our own clock, so that no two clocks are ever compared. Raises OrchestratorError when another driver holds it.
    """

    def __init__(
        self,
        store: RunStore,
        name: str,
        say: Callable[[str], None],
        *,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
    ) -> None:
        self._store, self._name, self._say = store, name, say
        self._beat_s, self._stale_s = beat_s, stale_s
        self._key = lease_name(name)
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.token = uuid.uuid4().hex
        self.lost = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._tag = Tag(None, None)

    def __enter__(self) -> StoreLease:
        self._tag = self._acquired()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OrchestratorError):  # it grows stale by itself
            if holder_of(self._store, self._name) == self.token:
                self._store.delete([self._key])

    def _text(self) -> bytes:
        held = {
            "token": self.token,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "machine": _machine(),
            "since": self._since,
            "renewed": time.time(),
        }
        return json.dumps(held).encode()

    def _acquired(self) -> Tag:
        seen: Tag | None = None
        since = time.monotonic()
        while True:
            found = self._store.get(self._key)
            if found is None:
                tag = self._store.create(self._key, self._text())
            else:
                holder, held = _holder(found[0]), found[1]
                if holder.get("token") == self.token:
                    return held  # ours: the answer to our request was lost
                if seen is not None and held != seen:
                    raise self._refusal(holder)  # renewed before our eyes
                if seen is None:
                    seen, since = held, time.monotonic()
                    if not _is_dead(holder):
                        self._say(f"Waiting up to {self._stale_s:g} s: is {_who(holder)} still driving this run?")
                tag = None
                if _is_dead(holder) or time.monotonic() - since >= self._stale_s:
                    tag = self._store.replace(self._key, self._text(), held)
            if tag is not None:
                return tag
            time.sleep(min(_LOOK_S, self._beat_s / 2))

    def _refusal(self, holder: dict[str, Any]) -> OrchestratorError:
        return OrchestratorError(
            f"{self._name}: this run is already being driven by {_who(holder)}; "
            "stop that one first, or give this run another name"
        )

    def _renew(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                tag = self._store.replace(self._key, self._text(), self._tag)
                if tag is None:
                    found = self._store.get(self._key)
                    if found is None or _holder(found[0]).get("token") != self.token:
                        self.lost.set()
                        return
                    tag = found[1]  # ours: the answer to our request was lost
                self._tag = tag
            except OrchestratorError:
                continue  # a store that does not answer: whoever takes over meanwhile fences us off


def lease_name(name: str) -> str:
    """The object that holds the lease of a run."""
    return f".{name}.lease"


def holder_of(store: RunStore, name: str) -> str | None:
    """The token of the driver that holds the lease of a run; None for nobody."""
    found = store.get(lease_name(name))
    return None if found is None else _holder(found[0]).get("token")


def _holder(content: bytes) -> dict[str, Any]:
    try:
        held = json.loads(content)
    except ValueError:
        held = None
    return held if isinstance(held, dict) else {}


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _machine() -> str:
    """This boot of this machine and its space of process numbers: hosts may share a name, containers a kernel."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine and is gone."""
    if not _machine() or holder.get("machine") != _machine():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError, ValueError):
        return False
    return False
