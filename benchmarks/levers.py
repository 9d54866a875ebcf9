"""What each lever of the local objective does to the accuracy, at one budget: on and off, over several seeds.

    python -m benchmarks.levers TRAIN TEST --name NAME [--only LEVER ...] [--keep FOLDER]
    python -m benchmarks.levers TRAIN TEST --name NAME --adaptive

TRAIN and TEST are what `orchestrator data pack` takes (a folder of images per class, or a tar of that) or its output;
`digits` as TRAIN (and TEST) are the embedded ones. All rows train the same convolutional layers (but `shortcuts`) on
the same images for the same epochs, one process with one thread; a row differs from `hff` by what its name says. The
options were set beforehand and nothing is selected on the test images. Cost is the processor's time of the training
process, so other work on the machine hardly shows in it. `--adaptive` compares numbers of prototypes per class, set by
hand and found in training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import publish
from benchmarks.objectives import packed
from benchmarks.transfer import merged

BASE = "hff"
LEVERS: dict[str, dict[str, Any]] = {
    BASE: {},
    "ce": {"objective": {"name": "ce"}},
    "similarity 0.5": {"objective": {"similarity": 0.5}},
    "ce, similarity 0.5": {"objective": {"name": "ce", "similarity": 0.5}},
    "coarse": {"objective": {"coarse": [4, 6]}},
    "1 hidden convolution": {"objective": {"aux_convs": 1}},
    "2 hidden convolutions": {"objective": {"aux_convs": 2}},
    "shortcuts": {"model": {"arch": "resnet"}},
    "without shortcuts": {},
    "fitted vote": {"model": {"vote": "fitted"}},
    "2x2 grid": {"model": {"head_grid": 2}},
    "fixed scale": {"objective": {"learn_scale": False}},
    "margin 0.1": {"objective": {"margin": 0.1}},
    "4 prototypes": {"objective": {"prototypes_per_class": 4}},
    "blocks of 2 layers": {"objective": {"block_size": 2}},
    "BP": {"objective": {"name": "bp"}},
}
WIDTHS = {"widths": [16, 32, 64, 64], "pool_after": [0, 1, 2]}
# Shortcuts need layers of equal width to show anything.
DEEP = {"widths": [16, 32, 32, 32, 64, 64, 64], "pool_after": [0, 1, 4]}
BY_HAND = (1, 2, 3, 4, 8)
ADAPTIVE = Path(__file__).parent / "adaptive_prototypes.py"


def job(name: str, change: Mapping[str, Any], data: Mapping[str, Any], runs: Path, given: argparse.Namespace) -> Any:
    """A valid job of one row and seed."""
    from orchestrator.job.load import job_from_values

    own_objective = change.get("objective", {})
    base = {
        "kind": "train",
        "name": name,
        "runs": str(runs),
        "data": data,
        "model": {"arch": "vgg", "head_grid": given.grid, **(DEEP if "shortcuts" in name else WIDTHS)},
        "objective": {} if "name" in own_objective else {"name": "hff"},
        "train": {
            "epochs": given.epochs, "global_batch_size": 100, "lr": given.lr, "eval_every_epochs": 1000,
        },
        "checkpoint": {"every_epochs": 1000},
        "cluster": {"launcher": "process", "workers": 1, "threads_per_worker": 1, "max_failures": 0},
    }  # fmt: skip
    return job_from_values(merged(base, change))


def trained(made: Any) -> dict[str, Any]:
    """The summary of a run with its processor seconds, from the run's folder where it is finished."""
    from orchestrator.launch.driver import run_job

    cost = Path(made.runs) / made.name / "processor_s.json"
    began = time.process_time()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        summary = run_job(made, say=lambda line: None)
    if not cost.exists():
        cost.write_text(json.dumps(time.process_time() - began))
    return {**summary, "processor_s": json.loads(cost.read_text())}


def words(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample deviation."""
    spread = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def paired(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean difference of the same seeds with its standard error."""
    difference = [a - b for a, b in zip(values, others, strict=True)]
    error = f" ({statistics.stdev(difference) / math.sqrt(len(difference)):.2f})" if len(difference) > 1 else ""
    return f"{statistics.fmean(difference):+.2f}{error}"


def rows(
    changes: Mapping[str, Mapping[str, Any]], data: Mapping[str, Any], runs: Path, given: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """The summaries of all seeds of every row; seeds outside, so that what is there after a stop is comparable."""
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in changes}
    for seed in range(given.seeds):
        for label, change in changes.items():
            name = f"{label.replace(' ', '-').replace(',', '')}-{seed}"
            made = job(name, merged(change, {"train": {"seed": seed}}), data, runs, given)
            found[label].append(trained(made))
            print(f"{label}, seed {seed}: {100 * found[label][-1]['val_top1']:.2f}", flush=True)
    return found


def levers_table(found: Mapping[str, list[dict[str, Any]]], localities: Mapping[str, str]) -> list[dict[str, Any]]:
    top1 = {label: [100 * s["val_top1"] for s in own] for label, own in found.items()}
    table = []
    for label, own in found.items():
        base = "without shortcuts" if label == "shortcuts" else BASE
        layers = zip(*([layer["val_top1"] for layer in s["layers"]] for s in own), strict=True)
        table.append(
            {
                "lever": label,
                "locality": localities[label],
                "top-1, %": words(top1[label]),
                "against": base,
                "difference": paired(top1[label], top1[base]) if label != base else "",
                "by layer, %": " ".join(f"{100 * statistics.fmean(layer):.1f}" for layer in layers),
                "processor s": words([s["processor_s"] for s in own], 0),
            }
        )
    return table


def prototypes(run: Path) -> float:
    """Prototypes per class and layer that an adaptive run ended with."""
    from orchestrator.run.inference.trained import trained_run

    heads: list[Any] = [layer.head for layer in trained_run(run).layers()]
    return statistics.fmean(float(head.active_CM.sum(dim=1).double().mean()) for head in heads)


def adaptive_table(found: Mapping[str, list[dict[str, Any]]], runs: Path) -> tuple[list[dict[str, Any]], list[str]]:
    top1 = {label: [100 * s["val_top1"] for s in own] for label, own in found.items()}
    best = max((label for label in found if label != "adaptive"), key=lambda label: statistics.fmean(top1[label]))
    table = []
    for label, own in found.items():
        if label == "adaptive":
            counts = [prototypes(runs / s["name"]) for s in own]
        else:
            counts = [float(label.split()[0])] * len(own)
        table.append(
            {
                "prototypes per class": label,
                "number": words(counts),
                "top-1, %": words(top1[label]),
                f"against {best}": "" if label == best else paired(top1[label], top1[best]),
                "processor s": words([s["processor_s"] for s in own], 0),
            }
        )
    return table, [f"the best number set by hand is the one with the highest mean: {best}"]


def by_number(steps: int) -> dict[str, dict[str, Any]]:
    """One row for each number set by hand, and the adaptive one, which starts with 4 and settles in the last third."""
    own = {"name": "own", "file": str(ADAPTIVE), "class": "AdaptivePrototypes"}
    return {
        **{f"{n} by hand": {"objective": {"prototypes_per_class": n}} for n in BY_HAND},
        "adaptive": {"objective": {**own, "every": max(10, steps // 20), "until": 2 * steps // 3}},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", help="images to learn, or digits")
    parser.add_argument("test", nargs="?", help="images to test on; a quarter of digits is held out")
    parser.add_argument("--name", required=True, help="the data's name, in the title and in the file of the result")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--grid", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--coarse", type=int, nargs="+", default=[4, 6], help="super-classes of the first layers")
    parser.add_argument("--only", nargs="+", choices=LEVERS, default=list(LEVERS), metavar="LEVER")
    parser.add_argument("--adaptive", action="store_true", help="numbers of prototypes per class, and nothing else")
    parser.add_argument("--keep", type=Path, help="keep shards and runs here; finished runs are not run again")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.keep or Path(scratch)).absolute()
        measure(folder, given)


def measure(folder: Path, given: argparse.Namespace) -> None:
    from orchestrator.job.network import locality

    runs = folder / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any]
    if given.train == "digits":
        data = {"train": "digits", "val": {"from_train": 0.25}, "image_size": 8, "channels": 1}
    else:
        train, test = (packed(source, folder / part) for source, part in ((given.train, "train"), (given.test, "test")))
        data = {"train": str(train), "val": str(test), "image_size": given.image_size}
        data["augment"] = {"crop_padding": 4, "flip": True}
    images = 1348 if given.train == "digits" else _images(Path(data["train"]))
    length = f"{given.epochs} epochs of {images} images at {data['image_size']} pixels"
    notes = [
        f"{length}, batch of 100, AdamW, lr {given.lr:g}, one-cycle, one thread; {given.seeds} seeds, mean +- sample "
        "deviation; differences are of the same seeds, with their standard error",
    ]
    places = "digits" if given.train == "digits" else "TRAIN TEST"
    command = f"python -m benchmarks.levers {places} --name {given.name} --epochs {given.epochs} --seeds {given.seeds}"
    command += f" --lr {given.lr:g} --grid {given.grid}"
    command += "" if given.train == "digits" else f" --image-size {given.image_size}"
    command += "" if given.adaptive else f" --coarse {' '.join(map(str, given.coarse))}"
    if given.adaptive:
        found = rows(by_number(math.ceil(images / 100) * given.epochs), data, runs, given)
        table, more = adaptive_table(found, runs)
        title = f"Prototypes per class on {given.name}: set by hand, and found in training"
        publish(f"adaptive_{given.name}", f"{command} --adaptive", title, table, [*notes, *more])
        return
    LEVERS["coarse"]["objective"]["coarse"] = given.coarse
    wanted = [label for label in LEVERS if label in given.only or label == BASE]
    if "shortcuts" in wanted and "without shortcuts" not in wanted:
        wanted.append("without shortcuts")
    changes = {label: LEVERS[label] for label in wanted}
    found = rows(changes, data, runs, given)
    localities = {label: locality(job("x", change, data, runs, given)) for label, change in changes.items()}
    notes += [
        "no learning rate was tuned, that of the BP control neither",
        f"widths {WIDTHS['widths']}, pooled after {WIDTHS['pool_after']}; with and without shortcuts "
        f"{DEEP['widths']}, pooled after {DEEP['pool_after']}",
        f"coarse: the first layers learn {given.coarse} super-classes, and do not tell their members apart",
    ]
    publish(f"levers_{given.name}", command, f"Levers on {given.name}", levers_table(found, localities), notes)


def _images(shards: Path) -> int:
    from orchestrator.data.index import open_index

    return int(open_index(shards).num_samples)


if __name__ == "__main__":
    main()
