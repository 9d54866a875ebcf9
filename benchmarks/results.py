"""docs/results.md from the summaries of runs.

python -m benchmarks.results                    # make the page from benchmarks/results/runs/*.json
python -m benchmarks.results RUN... --note TEXT # add finished runs first
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, machine
from benchmarks.run import section

FOLDER = RESULTS / "runs"
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
# Benchmarks whose result is an accuracy; benchmarks/run.py has those that are ratios of speed.
ACCURACIES = ("transfer", "levers_tiny-imagenet20", "adaptive_digits")
# Published rows, to stand beside ours; theirs are on the lossless images.
THEIRS = (
    ("HFF 2026 (CNN)", "S0", "CIFAR-10", "83.08", "arXiv 2605.00082"),
    ("local errors, CE only, 2019", "S0", "CIFAR-10", "91.60", "Noekland and Eidnes"),
    ("greedy layerwise k=1, 2019", "S0", "CIFAR-10", "88.3", "Belilovsky et al."),
)


HEAD = """\
# Results

Made by `python -m benchmarks.results` from the summaries in benchmarks/results/runs. Accuracies are percent, of the
final weights, on the validation data that the job names; nothing was selected on them. CIFAR-10 here means JPEG files
(quality 75), some points below the lossless original; the control uses the same files. Differences under about 1.5
points between single seeds say nothing.

| job | locality | val top-1 | seeds | per layer | epochs | images/s | minutes | GB | hardware | commit | note |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def add(run: Path, note: str) -> None:
    """Keep what a table needs of a finished run."""
    summary = json.loads((run / "summary.json").read_text())
    kept = {"summary": summary, "machine": machine(), "note": note}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{summary['name']}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def locality(job: str) -> str:
    return "BP (control)" if job.endswith("-bp") else "S0"


def row(job: str, found: list[dict[str, Any]]) -> str:
    """One job, over its seeds."""
    summaries = [f["summary"] for f in found]
    values = [100 * s["val_top1"] for s in summaries]
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    first, m = summaries[0], found[0]["machine"]
    layers = " ".join(f"{100 * x['val_top1']:.1f}" for x in first["layers"])
    cells = (
        f"`jobs/{job}.yaml`",
        locality(job),
        f"{statistics.fmean(values):.2f}{spread}",
        str(len(values)),
        layers,
        str(first["epochs"]),
        f"{first['images_per_second']:.0f}",
        f"{first['wall_seconds'] / 60:.1f}",
        f"{max(first['peak_memory_bytes']) / 1e9:.2f}",
        f"{first['world_size']} workers, {first['stages']} stages on {m['cores']} cores of {m['processor']}",
        (first["git_commit"] or "-")[:9],
        found[0]["note"],
    )
    return "| " + " | ".join(cells) + " |"


def write_page() -> None:
    by_job: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(FOLDER.glob("*.json")):
        by_job.setdefault(file.stem.split("-seed-")[0], []).append(json.loads(file.read_text()))
    lines = HEAD.splitlines()
    lines += [row(job, found) for job, found in by_job.items()]
    lines += ["", "Published, on other files and with other budgets (theirs, not measured here):", ""]
    lines += ["| method | locality | data | top-1 | source |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in THEIRS]
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
