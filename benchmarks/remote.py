"""The first epoch from an object store, with an empty cache, against the same job on the local disk.

    python -m benchmarks.remote [--full]

The store is a process on this machine that gives at most 100 MB/s over all connections and answers each request after
20 ms. Both runs train the same network on the same shards, one worker, one thread; they take turns. images/s is
what summary.json says: the whole training loop with all waits, without start-up. What remains is the wait at the start,
for the first shard of each of the 16 lanes: it weighs as much as the epoch is short.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.common import publish, spread

BYTES_PER_S = 100e6
LATENCY_S = 0.02
PIECE = 2**18
CLASSES = 10

# A network that needs images quickly, and one that computes longer.
NETWORKS = ([16, 32, 64], [64, 128, 128])

JOB = """\
kind: train
name: {name}
runs: {runs}
data: {{train: '{train}', image_size: 96, lanes: 16, shuffle_window: 1024, cache: {{folder: {cache}}}}}
model: {{arch: vgg, widths: {widths}, pool_after: [0, 1], first_stride: 2, head_grid: 4}}
objective: {{name: hff}}
train: {{epochs: 1, global_batch_size: 50, optimizer: adamw, lr: 1e-3}}
cluster: {{launcher: process, workers: 1, stages: 1, threads_per_worker: 1}}
"""


class Link:
    """What all connections share: so many bytes a second, given out in the order of asking."""

    def __init__(self) -> None:
        self._lock, self._free = threading.Lock(), time.monotonic()

    def wait(self, count: int) -> None:
        """Wait until `count` bytes may go."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + count / BYTES_PER_S
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))


def serve(folder: Path, port: Any) -> None:
    """A store of the files of `folder` that knows ranges; puts its port into the queue `port`."""
    link = Link()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(LATENCY_S)
            file = folder / Path(self.path).name
            size = file.stat().st_size
            start, end = 0, size
            if "Range" in self.headers:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                start, end = int(first), int(last or size - 1) + 1
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            with open(file, "rb") as opened:
                while start < end:
                    count = min(PIECE, end - start)
                    link.wait(count)
                    os.sendfile(self.connection.fileno(), opened.fileno(), start, count)
                    start += count

        def setup(self) -> None:
            super().setup()
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.put(server.server_port)
    server.serve_forever()


def make_shards(folder: Path, images: int) -> int:
    """Pack images of noise, some 27 kB each; returns their bytes."""
    import numpy as np
    from PIL import Image

    from orchestrator.data.packing.pack import pack

    random = np.random.default_rng(0)
    source = folder / "source.tar"
    with tarfile.open(source, "w") as tar:
        for i in range(images):
            buffer = io.BytesIO()
            pixels = random.integers(0, 256, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
            member = tarfile.TarInfo(f"{i % CLASSES}/{i:06d}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    index = pack(source, folder / "shards", shard_bytes=8_000_000)
    source.unlink()
    return sum(shard.bytes for shard in index.shards)


def rate(folder: Path, name: str, train: str, widths: list[int]) -> tuple[float, dict[str, float]]:
    """images/s of one epoch with an empty cache, and what the network cost."""
    job, out = folder / f"{name}.yaml", folder / f"{name}.json"
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        job.write_text(JOB.format(name=name, runs=folder / "runs", train=train, cache=cache, widths=widths))
        command = [sys.executable, "-m", "orchestrator", "run", str(job), "--resume", "never", "--summary", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "runs" / name / "events.jsonl").read_text().splitlines()
    epoch = [event for event in map(json.loads, lines) if event["event"] == "epoch"][-1]
    return json.loads(out.read_text())["images_per_second"], epoch["remote"] or {}


def compared(folder: Path, url: str, widths: list[int], pairs: int, images: int, size: int) -> dict[str, Any]:
    """One row: a network on the same shards, near and far."""
    ratios, local, waits = [], [], []
    for _ in range(pairs):
        near, _ = rate(folder, "near", str(folder / "shards"), widths)
        far, counts = rate(folder, "far", url, widths)
        ratios.append(far / near)
        local.append(images / near)
        waits.append(counts["wait_s"])
        assert counts["bytes"] >= size, "the cache was not empty"
        print(f"pair {len(ratios)} of {pairs}: {ratios[-1]:.3f}", flush=True)
    return {
        "what": f"{images} images, {size / 1e6:.0f} MB, from a store at 100 MB/s and 20 ms, against the local disk",
        "widths": " ".join(map(str, widths)),
        "images/s ratio": spread(ratios),
        "epoch from the disk, s": spread(local),
        "waits of the loader, s": spread(waits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="seven pairs of longer epochs instead of three")
    arguments = parser.parse_args()
    pairs, images = (7, 20_000) if arguments.full else (3, 6_000)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = make_shards(folder, images)
        port = spawn.Queue()
        store = spawn.Process(target=serve, args=(folder / "shards", port), daemon=True)
        store.start()
        url = f"http://127.0.0.1:{port.get(timeout=60)}/shards"
        try:
            rows = [compared(folder, url, widths, pairs, images, size) for widths in NETWORKS]
        finally:
            store.kill()
            store.join()
    command = "python -m benchmarks.remote" + (" --full" if arguments.full else "")
    notes = ["first epoch, empty cache; shards of 8 MB; the store runs on the same cores"]
    publish("remote", command, "First epoch from an object store", rows, notes)


if __name__ == "__main__":
    main()
