"""Transfer: a backbone pretrained by a job of this project, frozen, then heads of two kinds for other classes.

    python -m benchmarks.transfer TRAIN.tar VAL.tar [--seeds 5] [--keep FOLDER]

The archives hold folders CLASS/IMAGE of 20 classes of Tiny-ImageNet (64 x 64 pixels). A small timm backbone learns
the first 12 classes end to end (BP), from random weights; its trunk goes into a file. The other 8 classes are then
learned from frozen features of that file, and of the same trunk with random weights (another one for each seed): by
HFF heads on all stages with fitted votes, by a linear probe at the last stage, and by linear heads on all stages.
Top-1 on the validation images of the 8 classes, mean and deviation over the seeds. The recipes were chosen on a
held-out fifth of the training images of the 8 classes (`--tune` shows that table); the validation images had no
part in it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import statistics
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import publish

BACKBONE, SIZE, PRETRAINED_CLASSES = "test_resnet", 64, 12
# Of the pretraining: crop and flip as usual for such images.
PRETRAINING: dict[str, Any] = {"epochs": 30, "global_batch_size": 64, "lr": 3e-3, "weight_decay": 0.05}
HEADS: dict[str, Any] = {
    "model": {"heads_at": "all", "head_grid": 4, "vote": "fitted"},
    "objective": {"name": "hff"},
    "train": {"epochs": 20, "global_batch_size": 100, "lr": 1e-2},
}
PROBE: dict[str, Any] = {
    "model": {"heads_at": "last", "head_grid": 2, "vote": "last"},
    "objective": {"name": "ce"},
    "train": {"epochs": 20, "global_batch_size": 100, "lr": 3e-3},
}
# What of the difference is due to the stages and the vote, and what to the heads.
LINEAR: dict[str, Any] = {
    "model": {"heads_at": "all", "head_grid": 4, "vote": "fitted"},
    "objective": {"name": "ce"},
    "train": {"epochs": 20, "global_batch_size": 100, "lr": 3e-3},
}
LEARNERS = {
    "HFF heads on all stages, fitted vote": HEADS,
    "linear probe at the last stage": PROBE,
    "linear heads on all stages, fitted vote": LINEAR,
}


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` in it, section by section."""
    result = dict(base)
    for key, value in change.items():
        own = result.get(key)
        result[key] = merged(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return result


def pack_classes(archive: Path, folder: Path, name: str) -> None:
    """Pack the first 12 classes of an archive and the others into shards of their own."""
    from orchestrator.data.packing.pack import pack

    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=folder) as scratch:
        files = [m for m in tar.getmembers() if m.isfile()]
        classes = sorted({Path(m.name).parent.name for m in files})
        for part, chosen in (("known", classes[:PRETRAINED_CLASSES]), ("new", classes[PRETRAINED_CLASSES:])):
            out = folder / f"{part}-{name}"
            if (out / "index.json").exists():
                continue
            for member in files:
                label = Path(member.name).parent.name
                content = tar.extractfile(member)
                if label in chosen and content is not None:
                    target = Path(scratch) / part / label / Path(member.name).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content.read())
            pack(str(Path(scratch) / part), out)


def job_values(folder: Path, name: str, change: Mapping[str, Any], *, threads: int) -> dict[str, Any]:
    base = {
        "kind": "transfer",
        "name": name,
        "runs": str(folder / "runs"),
        "data": {"train": str(folder / "new-train"), "val": str(folder / "new-val"), "image_size": SIZE},
        "model": {"backbone": BACKBONE, "pretrained": False},
        "features": {"dtype": "float32"},
        "train": {"eval_every_epochs": 1000},
        "cluster": {"launcher": "process", "threads_per_worker": threads, "max_failures": 0},
        "checkpoint": {"every_epochs": 1000},
    }
    return merged(base, change)


def run(values: dict[str, Any]) -> dict[str, Any]:
    """Train in this process; the summary."""
    from orchestrator.job.load import job_from_values
    from orchestrator.launch.driver import run_job

    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        return run_job(job_from_values(values), say=lambda line: None)


def pretrain(folder: Path, threads: int) -> tuple[Path, dict[str, Any]]:
    """The trunk's weights, learned from the 12 classes, and the summary of the run."""
    from orchestrator.run.inference.export import export_run

    change = {
        "data": {
            "train": str(folder / "known-train"),
            "val": str(folder / "known-val"),
            "augment": {"crop_padding": 6, "flip": True},
        },
        "model": {"freeze": "none", "heads_at": "last"},
        "objective": {"name": "bp", "label_smoothing": 0.1},
        "train": PRETRAINING,
    }
    summary = run(job_values(folder, "pretrain", change, threads=threads))
    file = folder / "trunk.safetensors"
    export_run(folder / "runs" / "pretrain", "timm", file, replace=True)
    return file, summary


def learn(
    folder: Path, name: str, learner: Mapping[str, Any], pretrained: Path | None, seed: int, threads: int
) -> dict[str, Any]:
    change = {"model": {"pretrained": str(pretrained) if pretrained else False}, "train": {"seed": seed}}
    return run(job_values(folder, f"{name}-{seed}", merged(learner, change), threads=threads))


def measure(folder: Path, file: Path, seeds: int, threads: int) -> list[dict[str, Any]]:
    """One row per learner and trunk; the accuracies of the seeds are in percent."""
    rows = []
    for (label, learner), weights in itertools.product(LEARNERS.items(), (file, None)):
        trunk = "pretrained" if weights else "random"
        name = f"{learner['objective']['name']}-{learner['model']['heads_at']}-{trunk}"
        summaries = [learn(folder, name, learner, weights, seed, threads) for seed in range(seeds)]
        found = [100 * s["val_top1"] for s in summaries]
        heads = [100 * statistics.fmean(of) for of in zip(*(_heads(s) for s in summaries), strict=True)]
        row = {
            "learner": label,
            "frozen trunk": trunk,
            "top-1, %": f"{statistics.fmean(found):.2f} +- {statistics.stdev(found):.2f}",
            "each head, %": " ".join(f"{h:.1f}" for h in heads),
            "each seed, %": " ".join(f"{f:.2f}" for f in found),
        }
        print(*row.values(), sep=", ", flush=True)
        rows.append(row)
    return rows


def _heads(summary: Mapping[str, Any]) -> list[float]:
    return [layer["val_top1"] for layer in summary["layers"]]


def margin(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The difference of two rows with its standard error."""
    a, b = ([float(f) for f in row["each seed, %"].split()] for row in (first, second))
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    return f"{statistics.fmean(a) - statistics.fmean(b):+.2f} points (standard error {error:.2f})"


def grid() -> Iterator[tuple[str, dict[str, Any]]]:
    """What the recipes were chosen from: as many for one learner as for the other."""
    wanted = (("probe", PROBE, (1, 2)), ("heads", HEADS, (2, 4)), ("linear", LINEAR, (2, 4)))
    for name, learner, sides in wanted:
        for lr, epochs, side in itertools.product((3e-3, 1e-2), (20, 40), sides):
            change = {"model": {"head_grid": side}, "train": {"lr": lr, "epochs": epochs}}
            yield f"{name}-lr-{lr:g}-epochs-{epochs}-grid-{side}", merged(learner, change)


def tune(folder: Path, file: Path, threads: int) -> None:
    """Every recipe of the grid on a held-out fifth of the training images, pretrained trunk, seed 0."""
    held_out = {"data": {"val": {"from_train": 0.2}}}
    for label, learner in grid():
        summary = learn(folder, f"tune-{label}", merged(learner, held_out), file, 0, threads)
        heads = " ".join(f"{100 * layer['val_top1']:.1f}" for layer in summary["layers"])
        print(f"{label}: {100 * summary['val_top1']:.2f} (heads {heads})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="tar of CLASS/IMAGE, 20 classes")
    parser.add_argument("val", type=Path, help="the same for validation")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for shards and runs, to go on with; default: a temporary one")
    parser.add_argument(
        "--tune", action="store_true", help="the table that the recipes were chosen from, and nothing else"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        pack_classes(arguments.train, folder, "train")
        pack_classes(arguments.val, folder, "val")
        file, summary = pretrain(folder, arguments.threads)
        print(f"pretrained on 12 classes: {100 * summary['val_top1']:.2f} % of their validation images", flush=True)
        if arguments.tune:
            tune(folder, file, arguments.threads)
            return
        rows = measure(folder, file, arguments.seeds, arguments.threads)
    heads, heads_random, probe, probe_random, linear, _ = rows
    notes = [
        f"{BACKBONE} at {SIZE} pixels, pretrained by BP on {PRETRAINED_CLASSES} classes of Tiny-ImageNet in "
        f"{summary['wall_seconds'] / 60:.1f} minutes: {100 * summary['val_top1']:.2f} % of their validation images.",
        "8 other classes, 4000 training and 400 validation images; mean +- sample deviation over the seeds. Random "
        "trunks are another one for each seed.",
        f"HFF heads against the linear probe, pretrained trunk: {margin(heads, probe)}.",
        f"HFF heads against linear heads on all stages, pretrained trunk: {margin(heads, linear)}.",
        f"Pretrained against random trunk: HFF heads {margin(heads, heads_random)}, "
        f"linear probe {margin(probe, probe_random)}.",
        "All on one pretrained trunk and the same 400 images: standard errors are those of the seeds alone; so many "
        "images give any one accuracy an error of 2 points.",
    ]
    command = f"python -m benchmarks.transfer TRAIN.tar VAL.tar --seeds {arguments.seeds}"
    publish("transfer", command, "Frozen transfer to 8 other classes: HFF heads against a linear probe", rows, notes)


if __name__ == "__main__":
    main()
