"""Loading images for training: this project's stream against the usual loaders, on two cores.

    python -m benchmarks.loader PHOTOGRAPHS.tar [--small IMAGES64.tar] [--peers PYTHON] [--copies 10] [--full]

PHOTOGRAPHS.tar holds full-size photographs as CLASS/NAME.JPEG, each used --copies times; IMAGES64.tar images of 64 x 64
pixels. PYTHON is the interpreter of an environment with what benchmarks/peers.txt names; without it those rows say so.
Everything is read from the page cache. All ways take turns, each in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import publish, spread

# Ways of benchmarks/loader_ways.py and what their rows are called.
PHOTOGRAPHS = {
    "ours": "this project: uint8 for the device, 2 threads",
    "ours, processes": "this project: uint8 for the device, 2 processes",
    "ours, normalised on the CPU": "this project: normalised floats, 2 threads",
    "usual": "DataLoader + Pillow + torchvision: normalised floats, 2 processes",
    "webdataset": "webdataset + WebLoader + Pillow, 2 processes",
    "streaming": "MosaicML Streaming + Pillow, 2 processes",
    "litdata": "litdata + Pillow, 2 processes",
    "ray": "Ray Data + Pillow, 2 CPUs",
}
SMALL = {
    "ours": "this project, 64 px, 2 threads",
    "ours, processes": "this project, 64 px, 2 processes",
    "webdataset": "webdataset + WebLoader + Pillow, 64 px, 2 processes",
}
READING = {
    "read": "this project: bytes alone, checked",
    "read by webdataset": "webdataset: bytes alone, its iterator",
}
IN_PEERS = ("streaming", "litdata")
LIMIT_S = 600


def make_data(tar: Path, folder: Path, copies: int) -> int:
    """A folder of images, `copies` of each, and the shards of it; returns the number of images."""
    from orchestrator.data.packing.pack import pack

    count = 0
    with tarfile.open(tar) as opened:
        for member in opened:
            content = opened.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            label, name = member.name.split("/")[-2:]
            (folder / "images" / label).mkdir(parents=True, exist_ok=True)
            data = content.read()
            for copy in range(copies):
                (folder / "images" / label / f"{copy}_{name.rsplit('.')[0]}.jpg").write_bytes(data)
            count += copies
    pack(folder / "images", folder / "shards", shard_bytes=32 * 2**20)
    return count


class Bench:
    """One folder of images, measured in several ways."""

    def __init__(self, folder: Path, size: int, peers: str | None) -> None:
        self._folder, self._size, self._peers = folder, size, peers
        self.rates: dict[str, list[float]] = {}
        self.missing: dict[str, str] = {}

    def _run(self, way: str, *options: str) -> str | None:
        """The output of a way, None when it does not work here; then `missing` says why."""
        if way in IN_PEERS and self._peers is None:
            self.missing[way] = "not measured: --peers was not given"
            return None
        python = self._peers if way in IN_PEERS and self._peers else sys.executable
        command = [python, "-m", "benchmarks.loader_ways", way, str(self._folder), str(self._size), *options]
        env = os.environ | {"TMPDIR": str(self._folder)}  # peers leave files behind
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=env)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            self.missing[way] = f"not measured: {last[:80]}"
            return None
        return done.stdout

    def make(self, tar: Path, copies: int, ways: Iterable[str]) -> int:
        """Write the folder of images, its shards, and the formats of peers; returns the number of images."""
        count = make_data(tar, self._folder, copies)
        for way in ways:
            if way in IN_PEERS:
                self._run(way, "--make")
        return count

    def turn(self, ways: Iterable[str]) -> None:
        """Measure each way once."""
        for way in ways:
            output = None if way in self.missing else self._run(way)
            if output is not None:
                line = next(line for line in output.splitlines() if line.startswith("images/s "))
                self.rates.setdefault(way, []).append(float(line.split()[1]))
                print(f"{way}, {self._size} px: {self.rates[way][-1]:.0f} images/s", flush=True)

    def rows(self, names: dict[str, str], against: str) -> list[dict[str, Any]]:
        """images/s, and the ratio to one of the ways in the same turn."""
        rows = []
        for way, name in names.items():
            rates, base = self.rates.get(way), self.rates.get(against)
            ratio = spread([a / b for a, b in zip(rates, base, strict=True)]) if rates and base else None
            found: Any = spread(rates) if rates else self.missing.get(way)
            rows.append({"what": name, "images/s": found, "ratio": ratio, "to": against})
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--small", type=Path)
    parser.add_argument("--peers")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="five rounds instead of one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        large = Bench(Path(scratch) / "photographs", 224, arguments.peers)
        count = large.make(arguments.photographs, arguments.copies, PHOTOGRAPHS)
        small = Bench(Path(scratch) / "small", 64, None)
        if arguments.small:
            small.make(arguments.small, 1, SMALL)
        for _ in range(5 if arguments.full else 1):
            large.turn(PHOTOGRAPHS)
            if arguments.small:
                small.turn([*SMALL, *READING])
    rows = large.rows(PHOTOGRAPHS, "usual")
    if arguments.small:
        rows += small.rows(SMALL, "webdataset") + small.rows(READING, "read by webdataset")
    notes = [
        f"{count} photographs ({arguments.copies} copies of each), 224 px random resized crops of 8 to 100 %, flips",
        "shuffled batches of 64 from the page cache, each way in its own process, from its eighth batch to its last",
        f"load average at the end {os.getloadavg()[1]:.1f}: above the number of cores others were at work too",
    ]
    options = f"--copies {arguments.copies}" + " --small tiny-imagenet20-train.tar" * bool(arguments.small)
    options += " --peers PEERS/bin/python" * bool(arguments.peers) + " --full" * arguments.full
    command = f"python -m benchmarks.loader imagenet-samples200.tar {options}"
    publish("loader", command, "Loading images for training, on two cores", rows, notes)


if __name__ == "__main__":
    main()
