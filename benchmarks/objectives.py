"""FF, HFF, a local linear classifier (ce) and BP on MNIST in one table; and what FF's inference costs at 1000 classes.

    python -m benchmarks.objectives --mnist TRAIN TEST [--epochs 5] [--ff-epochs 20] [--keep FOLDER]
    python -m benchmarks.objectives --classes

TRAIN and TEST are what `orchestrator data pack` takes (a folder of images per class, or a tar of that) or its output.
FF is jobs/mnist-ff.yaml as it is shipped, unless --ff-epochs says otherwise. The others learn the same fully connected
layers on the same images with another objective, batch norms, which FF cannot have (docs/objectives.md), and the last
layer's decision. One process with one thread each. Training cost is the processor's time for the whole run; inference
is timed without reading images, all four on the same batch, taking turns. Then a VGG-like trunk with 1000 classes at
64 pixels: HFF decides in one pass, FF in one for each class, batched over classes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.common import interval, publish, spread
from hff import GreedyNetwork, HeadOptions, VggOptions, build_layers
from hff.goodness import write_labels

if TYPE_CHECKING:
    from orchestrator.job.schema import Job

JOB = Path(__file__).parent.parent / "jobs" / "mnist-ff.yaml"
_ROUNDS = 5
_BATCH = 200
_NORMED = ("model.norm=batch", "model.vote=last", "train.lr=3e-3")
# What each learner changes in the job.
LEARNERS: dict[str, tuple[str, ...]] = {
    "FF": (),
    "HFF": (*_NORMED, "objective={name: hff}"),
    "ce": (*_NORMED, "objective={name: ce}"),
    "BP": (*_NORMED, "objective={name: bp}"),
}
CLASSES, SIZE, IMAGES = 1000, 64, 4
TRUNK = VggOptions(widths=(32, 64, 128, 128), pool_after=(0, 1, 2), head_grid=2, norm="none")


def job(name: str, folder: Path, train: Path, test: Path, epochs: int) -> Job:
    """One learner's job."""
    from orchestrator.job.load import load_job

    places = {"name": f"{name.lower()}-{epochs}", "runs": folder.resolve() / "runs"}
    places |= {"data.train": train.resolve(), "data.val": test.resolve()}
    changes = [f"{key}={json.dumps(str(value))}" for key, value in places.items()]
    return load_job(JOB, [*changes, f"train.epochs={epochs}", "cluster.launcher=process", *LEARNERS[name]])


def packed(source: str, folder: Path) -> Path:
    """The shards of a data set, packed where they are not yet."""
    from orchestrator.data.packing.pack import pack

    if (Path(source) / "index.json").exists():
        return Path(source)
    if not (folder / "index.json").exists():
        pack(source, folder)
    return folder


def trained(job: Job) -> tuple[dict[str, Any], GreedyNetwork]:
    """The summary of a run, and its network."""
    from orchestrator.launch.driver import run_job
    from orchestrator.run.inference.trained import trained_run

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        summary = run_job(job, say=lambda line: None)
    return summary, trained_run(Path(job.runs) / job.name).classifier().network


def seconds(ways: dict[str, Callable[[], object]], rounds: int = _ROUNDS) -> dict[str, list[float]]:
    """Seconds of each way, taking turns; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if turn:
                    taken[name].append(time.perf_counter() - began)
    return taken


def mnist_table(train: Path, test: Path, folder: Path, epochs: int, ff_epochs: int) -> list[dict[str, Any]]:
    """A row for each learner."""
    results: dict[str, dict[str, Any]] = {}
    networks: dict[str, GreedyNetwork] = {}
    for name in LEARNERS:
        length = ff_epochs if name == "FF" else epochs
        cost = folder / f"{name}-{length}-epochs.json"
        began = time.process_time()
        summary, networks[name] = trained(job(name, folder, train, test, length))
        if not cost.exists():
            cost.write_text(json.dumps(time.process_time() - began))
        results[name] = {"summary": summary, "cpu_s": json.loads(cost.read_text()), "epochs": length}
        print(f"{name}: {summary['val_top1']:.4f}", flush=True)
    x = torch.rand(_BATCH, 1, 28, 28)
    timed = seconds({name: _call(network, x) for name, network in networks.items()})
    return [
        {
            "method": name,
            "locality": "BP" if name == "BP" else "S0",
            "test top-1, %": 100 * result["summary"]["val_top1"],
            "epochs": result["epochs"],
            "training, processor s": result["cpu_s"],
            "of one epoch": result["cpu_s"] / result["epochs"],
            "trained images/s": result["summary"]["images_per_second"],
            "inference, images/s": _BATCH / spread(timed[name])["median"],
        }
        for name, result in results.items()
    ]


def _call(network: GreedyNetwork, x: Tensor) -> Callable[[], Tensor]:
    return lambda: network(x)


def ff_classes(network: GreedyNetwork, x: Tensor, classes: int, at_once: int) -> Tensor:
    """FF's decision, `at_once` classes in a batch: what memory allows is faster than all at once."""
    layers = [layer for layer in network.layers if hasattr(layer, "logits")]
    found = []
    for labels in torch.arange(classes).split(at_once):
        y = write_labels(x, labels.expand(len(x), -1), classes)
        goodness = torch.zeros(len(x), len(labels))
        for layer in layers:
            y = layer(y)  # type: ignore[operator]
            goodness += layer.logits(y)  # type: ignore[operator]
        found.append(goodness)
    return torch.cat(found, dim=1).argmax(dim=1)


def classes_table(rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """1000 classes: one pass against one for each class, on one trunk and one batch."""
    x = torch.rand(IMAGES, 3, SIZE, SIZE)
    made = {
        kind: GreedyNetwork(
            build_layers(TRUNK, (3, SIZE, SIZE), HeadOptions(kind, CLASSES), seed=0), vote="equal"
        ).eval().to(memory_format=torch.channels_last)
        for kind in ("prototype", "goodness")
    }  # fmt: skip
    pictures = x.contiguous(memory_format=torch.channels_last)
    # The number of classes in a batch that is fastest here: FF must not lose for a bad choice of ours.
    tried = {n: _least(lambda n=n: ff_classes(made["goodness"], x[:1], CLASSES, n)) for n in (25, 100)}
    at_once = min(tried, key=lambda n: tried[n])
    timed = seconds(
        {"HFF": lambda: made["prototype"](pictures), "FF": lambda: ff_classes(made["goodness"], x, CLASSES, at_once)},
        rounds,
    )
    ratios = [ff / hff for ff, hff in zip(timed["FF"], timed["HFF"], strict=True)]
    rows = [
        {"method": name, "images/s": spread([IMAGES / s for s in timed[name]]), "HFF / FF": ratio}
        for name, ratio in (("HFF", interval(ratios)), ("FF", 1.0))
    ]
    notes = [
        f"widths {list(TRUNK.widths)}, {SIZE} px, {CLASSES} classes, {IMAGES} images, one thread; every head votes",
        f"FF: {at_once} classes at once, the fastest of {', '.join(map(str, tried))}",
    ]
    return rows, notes


def _least(way: Callable[[], object]) -> float:
    return min(seconds({"": way}, rounds=1)[""])


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mnist", nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--ff-epochs", type=int, default=20, help="20 are those of the job")
    parser.add_argument("--keep", type=Path, help="keep shards and runs here; finished runs are not run again")
    parser.add_argument("--classes", action="store_true", help="time the inference of 1000 classes")
    given = parser.parse_args(arguments)
    if given.mnist is None and not given.classes:
        parser.error("give --mnist TRAIN TEST, --classes, or both")
    torch.set_num_threads(1)
    if given.classes:
        rows, notes = classes_table(rounds=3)
        publish(
            "objectives_classes", "python -m benchmarks.objectives --classes",
            "Inference of 1000 classes: one pass (HFF) against one for each class (FF)", rows, notes,
        )  # fmt: skip
    if given.mnist is None:
        return
    with _folder(given.keep) as folder:
        train, test = (
            packed(source, folder / name) for source, name in zip(given.mnist, ("train", "test"), strict=True)
        )
        rows = mnist_table(train, test, folder, given.epochs, given.ff_epochs)
    lengths = f"--epochs {given.epochs} --ff-epochs {given.ff_epochs}"
    publish(
        "objectives", f"python -m benchmarks.objectives --mnist TRAIN TEST {lengths}",
        "FF, HFF, ce and BP on MNIST", rows,
        [
            "two fully connected layers of 800, batch of 100, AdamW, one-cycle, seed 0, no augmentation, one thread; "
            "final weights",
            "FF: jobs/mnist-ff.yaml; no norms (it cannot have them), two images per sample in training, one pass per "
            "class in inference; its cost has three evaluations on the way",
            f"inference on random images in memory, batch of {_BATCH}, all heads with a vote",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
