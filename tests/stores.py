"""An object store on this machine and, before it, a door that can be made to fail: what a bad network does."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

BUCKET = "images"


class Bucket:
    """moto's S3 server with one bucket that everybody may read."""

    def __init__(self) -> None:
        import boto3
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.port = int(self._server.get_host_and_port()[1])
        self._client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id="AKIATEST",
            aws_secret_access_key="secret",
        )
        self._client.create_bucket(Bucket=BUCKET)

    def upload(self, folder: Path, prefix: str) -> None:
        """Every file of a folder, as a user's own tool copies them."""
        for file in sorted(folder.iterdir()):
            self.put(f"{prefix}/{file.name}", file.read_bytes())

    def put(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=content, ACL="public-read")

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=key)

    def get(self, key: str) -> bytes:
        content: bytes = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def names(self, prefix: str) -> list[str]:
        """The keys below a prefix, without it."""
        found = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
        return sorted(entry["Key"].removeprefix(f"{prefix}/") for entry in found)

    def close(self) -> None:
        self._client.close()
        self._server.stop()


@dataclass
class Fault:
    """What happens to the next `times` requests with this method whose path contains `where`.

    `kind` is a status (503), or reset (no answer), lost (done, but no answer), cut (the connection ends after `after`
    bytes of the answer's body), stall (nothing comes after these, for `seconds`) or flip (the byte after these is
    another one).
    """

    kind: str | int
    where: str = ".tar"
    times: int = 1
    method: str = "GET"
    after: int = 0
    seconds: float = 30.0


@dataclass
class Door:
    """A proxy before the bucket: keeps what was asked, and how often each fault fired."""

    upstream: int
    faults: list[Fault] = field(default_factory=list)
    fired: Counter[str | int] = field(default_factory=Counter)
    asked: list[tuple[str, int]] = field(default_factory=list)
    written: list[tuple[str, str]] = field(default_factory=list)
    # The keys that each request to delete names.
    deleted: list[list[str]] = field(default_factory=list)
    port: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, method: str, path: str, start: int) -> Fault | None:
        """The fault of this request, None for none."""
        with self._lock:
            if method == "GET":
                self.asked.append((path.rpartition("/")[2], start))
            else:
                self.written.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and fault.where in path:
                    fault.times -= 1
                    self.fired[fault.kind] += 1
                    return fault
        return None


@contextmanager
def door(upstream: int, *faults: Fault) -> Iterator[Door]:
    """A door before the server at port `upstream` while the block lasts."""
    state = Door(upstream, list(faults))
    handler = type("Handler", (_Handler,), {"door": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    door: ClassVar[Any]

    def do_GET(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "POST" and self.path.endswith("?delete"):
            self.door.deleted.append(re.findall("<Key>(.*?)</Key>", sent.decode()))
        fault = self.door.take(self.command, self.path, start)
        self.close_connection = True
        if fault is not None and fault.kind == "reset":
            self._reset()
            return
        if fault is not None and isinstance(fault.kind, int):
            self.send_response(fault.kind)
            self.end_headers()
            # Some servers repeat the key of the request: no message may.
            self.wfile.write(b"<Error><AWSAccessKeyId>AKIATEST</AWSAccessKeyId></Error>")
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.door.upstream, timeout=30)
        upstream.request(self.command, self.path, sent or None, headers=dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        if fault is not None and fault.kind == "lost":
            self._reset()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        if fault is not None and fault.kind == "flip":
            body = body[: fault.after] + bytes([body[fault.after] ^ 1]) + body[fault.after + 1 :]
        end = fault.after if fault is not None and fault.kind in ("cut", "stall") else len(body)
        with suppress(ConnectionError):  # who asked has seen enough
            self.wfile.write(body[:end])
            self.wfile.flush()
        if fault is not None and fault.kind == "stall":
            self.door.ended.wait(fault.seconds)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, format: str, *args: Any) -> None:
        return


def wait_until(condition: Any, timeout_s: float = 20.0) -> None:
    """Wait for a condition that other threads bring about."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
