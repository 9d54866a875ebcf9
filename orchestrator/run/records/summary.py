"""summary.json: what a run achieved and what it is made of."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from orchestrator.run.datasets import Datasets
from orchestrator.run.evaluate import Evaluation
from orchestrator.run.records.ledger import Ledger
from orchestrator.run.schedule import Schedule

if TYPE_CHECKING:
    from orchestrator.run.worker import Assignment

_PACKAGES = (
    "torch",
    "torchvision",
    "simplejpeg",
    "ray",
    "webdataset",
    "timm",
    "mlflow-skinny",
    "safetensors",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    from importlib.metadata import PackageNotFoundError, version

    from orchestrator import __version__

    found = {"orchestrator": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def make_summary(
    assignment: Assignment,
    schedule: Schedule,
    datasets: Datasets,
    ledger: Ledger,
    *,
    run_id: str | None,
    val: Evaluation | None,
    test: Evaluation | None,
    weights_sha256: str,
    images_per_second: float | None,
    train_seconds: float,
    samples_seen: int,
    efficiency: float | None,
    peak_memory_bytes: list[int],
    start: int,
) -> dict[str, Any]:
    """The summary of a finished run. Accuracies are fractions, of the final weights.

    `images_per_second` covers the last attempt; `train_seconds` the training loops of all attempts, without
    start-up and evaluation. `pipeline_efficiency` is the measured rate over that of the slowest stage
    computing alone, which is the fraction of the time in which that stage does not wait for another one.
    """
    job = assignment.job
    names = assignment.layer_names
    stages = [
        next(s for s, (first, last) in enumerate(assignment.ranges) if first <= i <= last) for i in range(len(names))
    ]
    return {
        "name": job["name"],
        "kind": job["kind"],
        "status": "finished",
        "run_id": run_id,
        "seed": job["train"]["seed"],
        "epochs": schedule.epochs,
        "steps": schedule.total_steps,
        "samples_seen": samples_seen,
        "samples_per_epoch": len(datasets.train.subset),
        "val_top1": None if val is None else val.top1,
        "val_top5": None if val is None else val.top5,
        "test_top1": None if test is None else test.top1,
        "test_top5": None if test is None else test.top5,
        "layers": [
            {
                "index": i,
                "name": name,
                "stage": stages[i],
                "val_top1": None if val is None else val.layer_top1[i],
            }
            for i, name in enumerate(names)
        ],
        "images_per_second": images_per_second,
        "wall_seconds": train_seconds,
        "world_size": sum(assignment.replicas),
        "stages": len(assignment.ranges),
        "replicas": assignment.replicas,
        "pipeline_efficiency": efficiency,
        "peak_memory_bytes": peak_memory_bytes,
        "attempts": assignment.attempt,
        "attempt_steps": [*assignment.attempt_steps, [start, schedule.total_steps]],
        "skipped_samples": ledger.skipped_samples,
        "weights_sha256": weights_sha256,
        "sample_keys_sha256": ledger.epochs,
        "order_sha256": ledger.order,
        "job_sha256": assignment.job_sha256,
        "index_sha256": datasets.train.index.sha256,
        "git_commit": assignment.git_commit,
        "versions": versions(),
    }
