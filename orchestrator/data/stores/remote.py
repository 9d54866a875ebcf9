"""Files of an object store or a web server: read in ranges, with time-outs, retries and a limit to both.

obstore speaks S3, GCS and HTTP and finds credentials in the environment. What fails for good (403, 404) is told
at once; what may pass (503, resets, cut or slow bodies) is tried again from the byte where it ended.
"""

from __future__ import annotations

import os
import random
import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import GCSStore, HTTPStore, S3Store

from orchestrator.errors import DataError, OrchestratorError
from orchestrator.job import paths

_CHUNK_BYTES = 2**16
_PROGRESS_BYTES = 2**20
_PASSING_STATUS = {408, 425, 429}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a public bucket)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS (GOOGLE_SKIP_SIGNATURE=true for a public bucket)",
    "https": "the server must let this machine read it without a login",
}


@dataclass(frozen=True)
class Patience:
    """How long to wait for a store, in seconds, and how often to try; a try that brings 1 MiB is none too many."""

    attempts: int = 8
    first_pause_s: float = 0.2
    longest_pause_s: float = 15.0
    connect_s: float = 5.0
    read_s: float = 20.0
    request_s: float = 120.0

    def pause_s(self, failures: int) -> float:
        """A random pause after so many failures in a row, longer each time: workers must not come back together."""
        return random.uniform(0.5, 1.0) * min(self.longest_pause_s, self.first_pause_s * 2.0 ** (failures - 1))


class Counters:
    """What reading from afar cost this process so far; safe to use from several threads.

    `hits` and `misses` count reads of samples whose shard was here or had to be waited for, `wait_s` how long they
    waited (all threads together), `bytes` what came over the network, `retries` what was asked again, `damaged`
    files that were not what the index says and were fetched again.
    """

    NAMES = ("hits", "misses", "bytes", "retries", "damaged", "wait_s")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(self.NAMES, 0.0)

    def add(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                self._values[name] += value

    def values(self) -> dict[str, float]:
        with self._lock:
            return dict(self._values)


def summed(counts: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Several counters together; None where there are none."""
    found = [c for c in counts if c is not None]
    return {name: sum(c[name] for c in found) for name in Counters.NAMES} if found else None


class Stopped(Exception):
    """The transfer was given up because nobody waits for it any more."""


class Passing(Exception):
    """A failure that may be over when the same is asked again."""


class Remote:
    """The files below one URL. Raises DataError for a URL that is not allowed, and for what cannot be read."""

    # What is said otherwise where the files are not shards: errors that last, a store that does not answer, the remedy.
    _refusal: type[OrchestratorError] = DataError
    _silence: type[OrchestratorError] = DataError
    _doing = "reading"
    _absent = "upload the whole folder that `orchestrator data pack` made, or correct the address"
    _changed = "the file changed after packing: upload what the index was made for"
    _again = "run the same command again when the store answers"

    def __init__(self, url: str, counters: Counters | None = None, patience: Patience | None = None) -> None:
        fault = paths.location_fault(url)
        if fault:
            raise DataError(f"{paths.redacted(url)}: {fault}")
        self.url = url.rstrip("/")
        self.counters = counters or Counters()
        self._patience = patience or Patience()
        self._scheme = paths.scheme(url) or ""
        self._store: Any = None
        self._lock = threading.Lock()

    def read(self, name: str, limit: int) -> bytes:
        """The whole of a small file. Raises DataError when it is larger than `limit` bytes."""
        failures = 0
        while True:
            content = bytearray()
            try:
                for chunk in self._body(name, 0, None):
                    content += chunk
                    if len(content) > limit:
                        raise self._refusal(f"{self.url}/{name}: expected at most {limit} bytes, found more")
                return bytes(content)
            except Passing as error:
                failures += 1
                self._pause(name, failures, str(error), None)

    def append(self, name: str, file: BinaryIO, size: int, stop: threading.Event | None = None) -> None:
        """Bring a file, whose first bytes may be here already, to its `size`. Raises DataError, Stopped."""
        failures = 0
        have = file.seek(0, os.SEEK_END)
        while have < size:
            before = have
            try:
                for chunk in self._body(name, have, size):
                    if stop is not None and stop.is_set():
                        raise Stopped
                    file.write(chunk)
                    have += len(chunk)
                if have < size:
                    raise Passing("the answer ended early")
            except Passing as error:
                failures = 1 if have - before >= _PROGRESS_BYTES else failures + 1
                self._pause(name, failures, str(error), stop)
            finally:
                file.flush()

    def part(self, name: str, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end` of a file, tried once. Raises DataError, whatever went wrong."""
        try:
            content = obstore.get_range(self._opened(), name, start=start, end=end)
        except (exceptions.BaseError, OSError) as error:
            self.counters.add(retries=1)
            raise DataError(f"{self.url}/{name}: {self._judged(name, error)}") from None
        self.counters.add(bytes=len(content))
        if len(content) != end - start:
            raise DataError(f"{self.url}/{name}: expected {end - start} bytes at {start}, found {len(content)}")
        return bytes(content)

    def _body(self, name: str, start: int, size: int | None) -> Iterator[memoryview]:
        """What a file holds from `start` on, as it comes; `size` is what it must have in all."""
        try:
            result = obstore.get(self._opened(), name, options={"range": {"offset": start}} if size else None)
            if size is not None and result.meta["size"] != size:
                raise self._refusal(
                    f"{self.url}/{name}: expected {size} bytes, found {result.meta['size']}; {self._changed}"
                )
            for chunk in result.stream(min_chunk_size=_CHUNK_BYTES):
                self.counters.add(bytes=len(chunk))
                yield memoryview(chunk)
        except (exceptions.BaseError, OSError) as error:
            raise self._judged(name, error) from None

    def _judged(self, name: str, error: Exception) -> Exception:
        """A fatal error in the user's words, or one to try again. Texts of servers may repeat keys: none is shown."""
        where = f"{self.url}/{name}"
        text = str(error)
        status = _status(text)
        if isinstance(error, FileNotFoundError):
            return self._refusal(f"{where}: there is no such file (404); {self._absent}")
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            remedy = _CREDENTIALS.get(self._scheme, _CREDENTIALS["https"])
            return self._refusal(f"{where}: {self._doing} is not allowed ({status or 403}); {remedy}")
        if isinstance(error, exceptions.NotSupportedError) or "NotPartial" in text:
            return self._refusal(f"{where}: the server does not answer range requests; use a server that does")
        if "169.254." in text or "metadata.google.internal" in text:
            return Passing(f"no credentials were found; {_CREDENTIALS.get(self._scheme, '')}")
        if status is not None and 400 <= status < 500 and status not in _PASSING_STATUS:
            return self._refusal(f"{where}: the server refuses the request ({status})")
        if isinstance(error, exceptions.GenericError | exceptions.BaseError):
            return Passing(f"status {status}" if status else _kind(text))
        return error

    def _pause(self, name: str, failures: int, reason: str, stop: threading.Event | None) -> None:
        if failures >= self._patience.attempts:
            raise self._silence(f"{self.url}/{name}: given up after {failures} tries in a row: {reason}; {self._again}")
        self.counters.add(retries=1)
        if (stop or threading.Event()).wait(self._patience.pause_s(failures)):
            raise Stopped

    def _opened(self) -> Any:
        """The store, opened on first use: a process that reads nothing asks for no credentials."""
        with self._lock:
            if self._store is None:
                self._store = _open_store(self.url, self._patience)
            return self._store


def _open_store(url: str, patience: Patience) -> Any:
    parts = urlsplit(url)
    kind, endpoint = parts.scheme.lower(), os.environ.get("AWS_ENDPOINT_URL", "")
    plain = kind == "http" or (kind == "s3" and endpoint.lower().startswith("http://"))
    if kind in ("http", "https"):
        _refuse_link_local(parts.hostname or "")
    elif kind == "s3" and endpoint:
        _refuse_link_local(urlsplit(endpoint).hostname or "")
    options: dict[str, Any] = {
        "client_options": {
            "allow_http": plain,
            "connect_timeout": f"{int(1000 * patience.connect_s)}ms",
            "read_timeout": f"{int(1000 * patience.read_s)}ms",
            "timeout": f"{int(1000 * patience.request_s)}ms",
        },
        # Retries are ours: they go on from the last byte, and they are counted.
        "retry_config": {"max_retries": 0},
    }
    try:
        if kind == "s3":
            return S3Store(parts.netloc, prefix=parts.path.strip("/") or None, **options)
        if kind == "gs":
            return GCSStore(parts.netloc, prefix=parts.path.strip("/") or None, **options)
        return HTTPStore.from_url(url, **options)
    except exceptions.BaseError:
        remedy = _CREDENTIALS.get(kind, "correct the address")
        raise DataError(f"{url}: the store cannot be opened with what the environment says; {remedy}") from None


def _refuse_link_local(host: str) -> None:
    """Names can point to the machine's metadata service too. What cannot be resolved is for the transfer to tell."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return
    for address in found:
        if paths.is_link_local(address):
            raise DataError(f"{host}: points to the link-local address {address}, which is no place for data")


def _status(text: str) -> int | None:
    found = re.search(r"status code: (\d{3})", text)
    return int(found.group(1)) if found else None


def _kind(text: str) -> str:
    """What went wrong on the way, in our words."""
    found = re.search(r"kind: (Timeout|Connect|Interrupted|Request|Decode)", text)
    words = {"Timeout": "no answer in time", "Connect": "no connection", "Interrupted": "the connection broke"}
    return words.get(found.group(1), "the connection failed") if found else "the connection failed"
