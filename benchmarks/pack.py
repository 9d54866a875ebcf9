"""Packing speed: full-size photographs laid out as ImageNet's train tar (class tars in a tar), packed and verified.

    python -m benchmarks.pack PHOTOGRAPHS.tar [--copies 20] [--full]

PHOTOGRAPHS.tar holds WNID/NAME.JPEG. The tar is in the page cache, so this is the cost of the tool, not of a disk. The
webdataset package's ShardWriter writes the same images, read from memory, for comparison. All take turns.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import publish, spread
from orchestrator.data.index import open_index
from orchestrator.data.packing.pack import pack
from orchestrator.data.parallel import cores
from orchestrator.data.verify import problems

Photos = dict[str, list[tuple[str, bytes]]]


def photographs(path: Path) -> Photos:
    """The images of a tar by class."""
    found: Photos = {}
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                wnid, name = member.name.split("/")[-2:]
                found.setdefault(wnid, []).append((name, content.read()))
    return found


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def train_tar(photos: Photos, copies: int, path: Path) -> int:
    """Write class tars, each image `copies` times, into one tar. Returns the number of images."""
    with tarfile.open(path, "w") as outer:
        for wnid, images in photos.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for copy in range(copies):
                    for name, data in images:
                        _add(tar, f"{copy}_{name}", data)
            _add(outer, f"{wnid}.tar", inner.getvalue())
    return copies * sum(len(images) for images in photos.values())


def with_webdataset(photos: Photos, copies: int, out: Path) -> None:
    """The same images and labels through the webdataset package's writer, in one process."""
    import webdataset  # here, or every process that packs would import it too

    out.mkdir()
    everything = [(label, data) for label, files in enumerate(photos.values()) for _, data in files] * copies
    random.Random(0).shuffle(everything)
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxsize=256 * 2**20, maxcount=10**9, verbose=0) as sink:
        for i, (label, data) in enumerate(everything):
            sink.write({"__key__": f"{i:09d}", "jpg": data, "cls": label})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--full", action="store_true", help="five rounds instead of three")
    arguments = parser.parse_args()
    photos, jobs = photographs(arguments.photographs), cores()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source, out = folder / "train.tar", folder / "out"
        count = train_tar(photos, arguments.copies, source)
        megabytes = source.stat().st_size / 1e6
        ways: dict[str, Callable[[], object]] = {
            "data pack, 1 process": lambda: pack(source, out, shard_bytes=32 * 2**20),
            "data verify, 1 process": lambda: problems(open_index(out)),
            f"data pack, {jobs} processes": lambda: pack(source, out, shard_bytes=32 * 2**20, jobs=jobs),
            f"data verify --decode, {jobs} processes": lambda: problems(open_index(out), decode=True, jobs=jobs),
            "webdataset.ShardWriter, 1 process": lambda: with_webdataset(photos, arguments.copies, out),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(5 if arguments.full else 3):
            for name, way in ways.items():
                if "verify" not in name:
                    shutil.rmtree(out, ignore_errors=True)
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
                print(f"{name}: {count / seconds[name][-1]:.0f} images/s", flush=True)
    rows = [
        {
            "what": name,
            "images/s": spread([count / s for s in taken]),
            "MB/s": spread([megabytes / s for s in taken]),
        }
        for name, taken in seconds.items()
    ]
    size = megabytes / count * 1000
    notes = [
        f"{count} photographs, {size:.0f} kB each; the source is in the page cache, shards are synced to disk",
        f"load average at the end {os.getloadavg()[1]:.1f}: above the number of cores others were at work too",
        "with the start of the processes; the writer of the webdataset package hashes nothing and does not sync",
    ]
    options = f"--copies {arguments.copies}" + (" --full" if arguments.full else "")
    title = "Packing full-size photographs from a tar of class tars"
    publish("pack", f"python -m benchmarks.pack imagenet-samples200.tar {options}", title, rows, notes)


if __name__ == "__main__":
    main()
