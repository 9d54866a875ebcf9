"""docs/results.md from the summaries of runs.

python -m benchmarks.results                    # make the page from benchmarks/results/runs/*.json
python -m benchmarks.results RUN... --note TEXT # add finished runs first

A run belongs to the job file in jobs/ that its name begins with (NAME, NAME-seed-S, NAME-lr-4e-3). Where nothing but
seed and epochs differ from what that file says it is a result, else something that was tried on the way to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import RESULTS, machine
from benchmarks.run import section
from orchestrator.job.resolved import decisive, flatten

if TYPE_CHECKING:
    from orchestrator.job.schema import Job

ROOT = Path(__file__).parent.parent
FOLDER = RESULTS / "runs"
PAGE = ROOT / "docs" / "results.md"
# Benchmarks whose result is an accuracy; benchmarks/run.py has those that are ratios of speed.
ACCURACIES = ("transfer", "levers_tiny-imagenet20", "shared_bank_tiny-imagenet20", "adaptive_digits")
# Published rows, to stand beside ours; theirs are on the lossless images.
THEIRS = (
    ("HFF 2026 (CNN)", "S0", "CIFAR-10", "83.08", "arXiv 2605.00082"),
    ("local errors, CE only, 2019", "S0", "CIFAR-10", "91.60", "Noekland and Eidnes"),
    ("greedy layerwise k=1, 2019", "S0", "CIFAR-10", "88.3", "Belilovsky et al."),
)
HEAD = """\
# Results

Made by `python -m benchmarks.results` from the summaries in benchmarks/results/runs. Accuracies are percent, of the
final weights, on the job's `data.test`; a job without it has its test images at `data.val`. Nothing was selected on
test images: where there is a held-out accuracy, the recipe was chosen by it. Of several seeds, the mean and the sample
deviation; layers, rate, minutes and memory (the peak of one worker) are those of the first. Parameters are those of the
bodies and of the heads. CIFAR-10 here means JPEG files (quality 75), some points below the lossless original; the
control uses the same files. Differences under about 1.5 points between single seeds say nothing.
"""
COLUMNS = (
    *("job", "method", "locality", "architecture", "parameters", "test top-1", "seeds", "held-out top-1"),
    *("per layer", "epochs", "images/s", "minutes", "GB", "hardware", "commit", "note"),
)
TRIED = """\
## What was tried

One seed each, at the same length; chosen by the held-out training images (the other column was looked at afterwards).
"""


def add(run: Path, note: str) -> None:
    """Keep what a table needs of a finished run."""
    from orchestrator.job.load import job_to_dict, load_job

    summary = json.loads((run / "summary.json").read_text())
    job = job_to_dict(load_job(run / "job.yaml"))
    kept = {"summary": summary, "machine": machine(), "note": note, "job": decisive(job)}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{summary['name']}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def changes(found: dict[str, Any]) -> list[str]:
    """What decides a run's result and is not as its job file says, but for seed and epochs, which the table shows."""
    from orchestrator.job.load import job_to_dict

    if "job" not in found:  # added before jobs were kept, as shipped
        return []
    given, shipped = flatten(found["job"]), flatten(decisive(job_to_dict(job_of(found["summary"]["name"]))))
    keys = sorted((given.keys() | shipped.keys()) - {"train.seed", "train.epochs"})
    return [f"{key}: {given.get(key)}" for key in keys if given.get(key) != shipped.get(key)]


def job_name(run: str) -> str:
    """The job file that a run belongs to: the one with the longest name that the run's begins with."""
    names = [path.stem for path in (ROOT / "jobs").glob("*.yaml")]
    return max((name for name in names if run == name or run.startswith(f"{name}-")), key=len)


def job_of(run: str) -> Job:
    from orchestrator.job.load import load_job

    return load_job(ROOT / "jobs" / f"{job_name(run)}.yaml")


def size(job: Job) -> tuple[str, str]:
    """Architecture and parameters in words."""
    from orchestrator.job.network import known_classes, layer_shapes

    shapes = layer_shapes(job, known_classes(job))
    bodies, heads = sum(s.parameters for s in shapes), sum(s.head_parameters for s in shapes)
    model: Any = job.model
    return f"{model.arch} {'-'.join(map(str, model.widths))}", f"{bodies / 1e6:.2f} + {heads / 1e6:.2f} M"


def percent(values: list[float | None]) -> str:
    """Mean and deviation of fractions."""
    given = [100 * value for value in values if value is not None]
    if len(given) < len(values):
        return "-"
    spread = f" +- {statistics.stdev(given):.2f}" if len(given) > 1 else ""
    return f"{statistics.fmean(given):.2f}{spread}"


def accuracies(job: Job, found: list[dict[str, Any]]) -> tuple[str, str]:
    """On test images, and on held-out training images."""
    val, test = ([f["summary"][f"{part}_top1"] for f in found] for part in ("val", "test"))
    return (percent(val), "-") if job.data.test is None else (percent(test), percent(val))


def row(name: str, found: list[dict[str, Any]]) -> tuple[str, ...]:
    """One job, over its seeds."""
    from orchestrator.job.network import locality

    job, first, m = job_of(name), found[0]["summary"], found[0]["machine"]
    assert len({f["summary"]["epochs"] for f in found}) == 1, f"{name}: runs of different lengths have no mean"
    test, held_out = accuracies(job, found)
    return (
        f"`jobs/{name}.yaml`",
        job.objective.name,
        locality(job) + (" (control)" if job.objective.name == "bp" else ""),
        *size(job),
        test,
        str(len(found)),
        held_out,
        " ".join(f"{100 * x['val_top1']:.1f}" for x in first["layers"]),
        str(first["epochs"]),
        f"{first['images_per_second']:.0f}",
        f"{first['wall_seconds'] / 60:.1f}",
        f"{max(first['peak_memory_bytes']) / 1e9:.2f}",
        f"{first['world_size']} workers, {first['stages']} stages on {m['cores']} cores of {m['processor']}",
        (first["git_commit"] or "-")[:9],
        found[0]["note"],
    )


def tried_row(found: dict[str, Any], varied: list[str]) -> tuple[str, ...]:
    """A run that differs from its job file, or one as shipped, with what it has of the keys that others `varied`."""
    name = job_name(found["summary"]["name"])
    test, held_out = accuracies(job_of(name), [found])
    values = flatten(found.get("job", {}))
    shipped = "; ".join(f"{key}: {values[key]}" for key in varied if values.get(key)) + " (as shipped)"
    return f"`jobs/{name}.yaml`", "; ".join(changes(found)) or shipped, held_out, test


def tried_rows(tried: list[dict[str, Any]], results: dict[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """What was tried for each job, beside the first of its results."""
    rows = []
    for job in sorted({job_name(found["summary"]["name"]) for found in tried}):
        own = [found for found in tried if job_name(found["summary"]["name"]) == job]
        varied = sorted({line.split(": ")[0] for found in own for line in changes(found)})
        rows += sorted(tried_row(found, varied) for found in [*own, *results.get(job, [])[:1]])
    return rows


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)] + [
        "| " + " | ".join(cells) + " |" for cells in rows
    ]


def write_page() -> None:
    by_job: dict[str, list[dict[str, Any]]] = {}
    tried: list[dict[str, Any]] = []
    for file in sorted(FOLDER.glob("*.json")):
        found = json.loads(file.read_text())
        if changes(found):
            tried.append(found)
        else:
            by_job.setdefault(job_name(file.stem), []).append(found)
    lines = [*HEAD.splitlines(), "", *table(COLUMNS, [row(job, found) for job, found in by_job.items()])]
    if tried:
        columns = ("job", "changed", "held-out top-1", "test top-1")
        lines += ["", *TRIED.splitlines(), "", *table(columns, tried_rows(tried, by_job))]
    lines += ["", "## Published", "", "On other files and with other budgets (theirs, not measured here):", ""]
    lines += table(("method", "locality", "data", "top-1", "source"), list(THEIRS))
    lines += ["", "ImageNet and every GPU row: not measured.", ""]
    for file in (RESULTS / f"{name}.json" for name in ACCURACIES):
        if file.exists():
            lines += [section(json.loads(file.read_text())), ""]
    PAGE.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="*", help="run folders to add")
    parser.add_argument("--note", default="", help="what the reader should know of these runs")
    arguments = parser.parse_args()
    for run in arguments.runs:
        add(run, arguments.note)
    write_page()
    print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()
