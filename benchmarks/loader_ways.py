"""The ways of loading that benchmarks/loader.py compares, each in a process of its own; run by it, also elsewhere.

    python -m benchmarks.loader_ways WAY FOLDER SIZE [--make]

Prints images/s, from the eighth batch to the end of one shuffled epoch of batches of 64, on two loader threads or
processes (what it says otherwise, with --make: writes the data of a peer that has a format of its own).
"""

from __future__ import annotations

import io
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

BATCH = 64
WORKERS = 2
WARM_UP = 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def usual_transform(size: int) -> Callable[[Any], Any]:
    """What most training scripts do to a PIL image."""
    from torchvision import transforms

    crop = [transforms.RandomResizedCrop(size)] if size > 64 else []
    rest = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose([*crop, *rest])


class FromBytes:
    """(bytes, label) to (normalised floats, label); a class, since workers may be spawned."""

    def __init__(self, size: int) -> None:
        self._transform = usual_transform(size)

    def __call__(self, data: bytes) -> Any:
        from PIL import Image

        return self._transform(Image.open(io.BytesIO(data)).convert("RGB"))


def source_of(folder: Path, size: int) -> Any:
    """This project's images of a folder of shards."""
    from orchestrator.data.index import open_index
    from orchestrator.data.loading.image_source import ImageSource

    augment: dict[str, Any] = {"flip": True} | ({"resized_crop": [0.08, 1.0]} if size > 64 else {})
    return ImageSource(open_index(folder / "shards"), image_size=size, channels=3, augment=augment)


def ours(folder: Path, size: int, *, processes: int = 0, normalised: bool = False) -> Iterator[int]:
    """This project's stream: uint8 batches, as they go to the device."""
    import numpy as np
    import torch

    from orchestrator.data.index import open_index
    from orchestrator.data.loading.processes import in_processes
    from orchestrator.data.loading.stream import TrainStream
    from orchestrator.run.datasets import Normalise

    torch.set_num_threads(1)
    samples = open_index(folder / "shards").num_samples
    remade = partial(source_of, folder, size)
    elsewhere = partial(in_processes, remade, processes=processes, prefetch=2 * processes) if processes else None
    stream = TrainStream(
        remade(), np.arange(samples), seed=0, lanes=48, window=8192, global_batch_size=BATCH,
        loader_threads=WORKERS, prefetch_batches=2 * WORKERS, elsewhere=elsewhere,
    )  # fmt: skip
    ready = Normalise({"channels": 3, "mean": MEAN, "std": STD}, torch.device("cpu"), torch.float32)
    for batch in stream.epoch(0):
        if normalised:
            ready(batch.images)
        yield len(batch.labels)


def counted(batches: Iterable[Any]) -> Iterator[int]:
    """Sizes of the batches of a torch loader."""
    for images, _ in batches:
        yield len(images)


def usual(folder: Path, size: int) -> Iterator[int]:
    """ImageFolder in a DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    data = ImageFolder(folder / "images", usual_transform(size))
    yield from counted(DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS))


def with_webdataset(folder: Path, size: int, *, workers: int = WORKERS) -> Iterator[int]:
    """webdataset with Pillow, as its documentation composes it."""
    import webdataset

    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    data = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(usual_transform(size))
        .batched(BATCH)
    )
    yield from counted(webdataset.WebLoader(data, batch_size=None, num_workers=workers))


def samples(folder: Path) -> Iterator[dict[str, Any]]:
    """What the folder of images holds, in random order, for peers with a format of their own."""
    import random

    classes = sorted(path for path in (folder / "images").iterdir())
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    random.Random(0).shuffle(files)
    for file, label in files:
        yield {"image": file.read_bytes(), "label": label}


def make_streaming(folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "streaming"), columns={"image": "bytes", "label": "int"}) as writer:
        for sample in samples(folder):
            writer.write(sample)


def with_streaming(folder: Path, size: int) -> Iterator[int]:
    """MosaicML Streaming with Pillow."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    decoded = FromBytes(size)

    class Images(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return decoded(sample["image"]), sample["label"]

    data = Images(local=str(folder / "streaming"), shuffle=True, batch_size=BATCH)
    yield from counted(DataLoader(data, BATCH, num_workers=WORKERS))


def _as_it_is(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


def make_litdata(folder: Path) -> None:
    import litdata

    litdata.optimize(
        _as_it_is, list(samples(folder)), str(folder / "litdata"), chunk_bytes="64MB", num_workers=1, verbose=False
    )


def with_litdata(folder: Path, size: int) -> Iterator[int]:
    """litdata with Pillow."""
    import litdata

    decoded = FromBytes(size)

    class Images(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return decoded(sample["image"]), sample["label"]

    data = Images(str(folder / "litdata"), shuffle=True)
    yield from counted(litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=WORKERS))


def with_ray(folder: Path, size: int) -> Iterator[int]:
    """Ray Data with Pillow, from the folder of images."""
    import numpy as np
    import ray

    decoded = FromBytes(size)

    def row(sample: dict[str, Any]) -> dict[str, Any]:
        return {"image": np.asarray(decoded(sample["bytes"]))}

    ray.init(num_cpus=WORKERS, include_dashboard=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    files = ray.data.read_binary_files(str(folder / "images"), shuffle="files").map(row)
    for batch in files.iter_torch_batches(batch_size=BATCH, prefetch_batches=2):
        yield len(batch["image"])
    ray.shutdown()


def read_ours(folder: Path, size: int) -> Iterator[int]:
    """Bytes and labels in shard order, checked against the index; nothing decoded."""
    import numpy as np

    from orchestrator.data.index import open_index
    from orchestrator.data.reader import ShardReader

    index = open_index(folder / "shards")
    reader = ShardReader(index)
    labels = index.labels.tolist()
    for first in range(0, index.num_samples, BATCH):
        last = min(first + BATCH, index.num_samples)
        yield len(list(zip(reader.read_many(np.arange(first, last)), labels[first:last], strict=True)))


def read_webdataset(folder: Path, size: int) -> Iterator[int]:
    """Bytes in shard order by webdataset's own iterator; nothing decoded, nothing checked."""
    import webdataset

    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    found = iter(webdataset.WebDataset(shards, shardshuffle=False))
    while batch := list(itertools.islice(found, BATCH)):
        yield len(batch)


WAYS: dict[str, Callable[[Path, int], Iterator[int]]] = {
    "ours": ours,
    "ours, normalised on the CPU": lambda folder, size: ours(folder, size, normalised=True),
    "ours, processes": lambda folder, size: ours(folder, size, processes=WORKERS),
    "usual": usual,
    "webdataset": with_webdataset,
    "streaming": with_streaming,
    "litdata": with_litdata,
    "ray": with_ray,
    "read": read_ours,
    "read by webdataset": read_webdataset,
}
MAKERS = {"streaming": make_streaming, "litdata": make_litdata}


def rate(sizes: Iterator[int]) -> float:
    """images/s after the first batches: start-up is not what is compared."""
    for _ in itertools.islice(sizes, WARM_UP):
        pass
    began = time.perf_counter()
    count = sum(sizes)
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    name, place, side, *make = sys.argv[1:]
    if make:
        MAKERS[name](Path(place))
    else:
        print(f"images/s {rate(WAYS[name](Path(place), int(side))):.2f}")
