"""Layerwise search against ASHA over whole networks, at half, equal and twice the measured compute.

    python -m benchmarks.search [--full]
    python -m benchmarks.search [--full] --mnist TRAIN TEST

Both search the same four values, one after the other in this process. Layerwise gives each layer values of its own and
trains one layer per trial; ASHA gives all layers the same values and trains them at the same time. Compute is the sum
of the seconds in the training loops of all trials. ASHA gets trials until it has spent twice what layerwise spent; its
best finished trial is taken at half the compute, at equal compute and at twice. TRAIN and TEST are packed folders.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import publish, spread
from orchestrator.job.load import load_any
from orchestrator.job.search import SearchJob
from orchestrator.launch.searches.search import run_search
from orchestrator.launch.searches.trial import run_trials_here
from orchestrator.run.folder import read_json

SEARCH = """\
kind: search
name: {name}
runs: {runs}
base:
  data: {data}
  model: {{arch: vgg, widths: [16, 32, 64], pool_after: {pool}, head_grid: 4}}
  objective: {{name: hff}}
  train: {{epochs: {epochs}, global_batch_size: {batch}, lr: 4.0e-3, lr_schedule: one-cycle, schedule: {schedule}}}
  cluster: {{launcher: process}}
strategy: {strategy}
space:
  train.lr: {{loguniform: [3.0e-4, 3.0e-2]}}
  train.weight_decay: {{choice: [0.0, 1.0e-3, 1.0e-2]}}
  objective.margin: {{uniform: [0.0, 0.3]}}
  objective.prototypes_per_class: {{randint: [1, 4]}}
scheduler: {{name: asha, grace_epochs: 1, reduction_factor: 2}}
samples: {samples}
seed: {seed}
"""
MOST_TRIALS = 200
_STEP = 3


def _search(text: str, folder: Path) -> dict[str, Any]:
    path = folder / "search.yaml"
    path.write_text(text, encoding="utf-8")
    job = load_any(path)
    assert isinstance(job, SearchJob)
    return run_search(job, say=lambda line: None, runner=run_trials_here)


def _within(summary: dict[str, Any], seconds: float) -> dict[str, Any] | None:
    """The best trial that had finished when so many seconds of training were spent, give or take 2 %."""
    spent, found = 0.0, None
    for trial in summary["trials"]:
        spent += trial["seconds"] or 0.0
        if spent > seconds * 1.02:
            break
        if trial["status"] == "finished" and (found is None or trial["metric"] > found["metric"]):
            found = trial
    return found


def _test_top1(folder: Path, search: str, trial: str) -> float | None:
    summary = read_json(folder / "runs" / search / "trials" / trial / "summary.json")
    return None if summary is None else summary["test_top1"]


def compare(data: str, seed: int, *, pool: str, epochs: int, batch: int, samples: int) -> dict[str, dict[str, Any]]:
    """Accuracy and seconds of both strategies with one seed of the search."""
    common = {"data": data, "pool": pool, "epochs": epochs, "batch": batch, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common["runs"] = str(folder / "runs")
        greedy = _search(
            SEARCH.format(**common, name="layerwise", strategy="layerwise", schedule="sequential", samples=samples),
            folder,
        )
        budget = greedy["train_seconds"]
        trials = _STEP
        flat = _search(
            SEARCH.format(**common, name="asha", strategy="flat", schedule="simultaneous", samples=trials), folder
        )
        while flat["train_seconds"] < 2 * budget and trials < MOST_TRIALS:
            trials += _STEP
            flat = _search(
                SEARCH.format(**common, name="asha", strategy="flat", schedule="simultaneous", samples=trials), folder
            )
        rows = {
            "layerwise": {
                "val": greedy["best"]["metric"],
                "test": _test_top1(folder, "layerwise", greedy["best"]["name"]),
                "seconds": budget,
                "trials": len(greedy["trials"]),
            }
        }
        for name, factor in (
            ("ASHA, half the compute", 0.5),
            ("ASHA, equal compute", 1.0),
            ("ASHA, twice the compute", 2.0),
        ):
            best = _within(flat, factor * budget)
            rows[name] = {
                "val": None if best is None else best["metric"],
                "test": None if best is None else _test_top1(folder, "asha", best["name"]),
                "seconds": factor * budget,
                "trials": None,
            }
        return rows


def rows_of(found: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per strategy over the seeds of the search."""
    rows = []
    for name in found[0]:
        of = [f[name] for f in found]
        row: dict[str, Any] = {"search": name}
        for key, label in (("val", "val top-1"), ("test", "test top-1"), ("seconds", "training, s")):
            values = [float(o[key]) for o in of if o[key] is not None]
            row[label] = spread(values) if values else None
        row = {key: value for key, value in row.items() if key != "test top-1" or value is not None}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="three seeds of the search instead of one")
    parser.add_argument("--mnist", nargs=2, metavar=("TRAIN", "TEST"), help="on packed MNIST instead of digits")
    arguments = parser.parse_args()
    command = "python -m benchmarks.search" + (" --full" if arguments.full else "")
    seeds = range(3) if arguments.full else range(1)
    notes = [
        "compute: seconds in the training loops of all trials, one trial at a time, one thread",
        f"median over {len(seeds)} seeds of the search, and the range; every search draws other values",
    ]
    if arguments.mnist is None:
        found = [compare("digits", seed, pool="[1]", epochs=6, batch=50, samples=6) for seed in seeds]
        notes.append("val is 450 images, which also choose the trial: 0.002 is one image")
        publish("search", command, "Layerwise search against ASHA on digits", rows_of(found), notes)
        return
    train, test = (Path(folder).absolute() for folder in arguments.mnist)
    data = f"{{train: {train}, val: {{from_train: 0.5}}, test: {test}, image_size: 28, channels: 1}}"
    found = [compare(data, seed, pool="[0, 1]", epochs=2, batch=100, samples=4) for seed in seeds]
    notes.append(
        "trained on half of the training images; the other half (val) chooses the trial, test has no part in it"
    )
    title = "Layerwise search against ASHA on MNIST, two epochs per layer and per network"
    publish("search_mnist", f"{command} --mnist TRAIN TEST", title, rows_of(found), notes)


if __name__ == "__main__":
    main()
