"""Every benchmark one after the other, then docs/benchmarks.md from their JSON.

python -m benchmarks.run [--full]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, shown

NAMES = ("local_step", "heads", "pipeline", "plan", "tax", "features", "saves", "remote", "search", "start")
# search_mnist and pack need data that a clean clone has not: their numbers stay as they were measured.
KEPT = ("pipeline_peers", "search_mnist", "pack", "loader", "tracking", "objectives", "objectives_classes")
SHOWN = (*NAMES, "saves_background", *KEPT)
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def section(result: dict[str, Any]) -> str:
    """One result as Markdown."""
    columns = list(result["rows"][0])
    lines = [f"## {result['title']}", "", f"`{result['command']}`", ""]
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("|" + "---|" * len(columns))
    for row in result["rows"]:
        lines.append("| " + " | ".join(shown(row[c]) for c in columns) + " |")
    lines.append("")
    lines += [f"- {note}" for note in result["notes"]]
    m = result["machine"]
    gpu = m["gpu"] or "no GPU"
    lines.append(
        f"- {m['cores']} cores of {m['processor']}, {gpu}; Python {m['python']}, torch {m['torch']}; {m['date']}"
    )
    return "\n".join(lines)


def write_page() -> None:
    files = [RESULTS / f"{name}.json" for name in SHOWN]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    head = (
        "# Benchmarks\n\nMade by `make bench` (short) or `make bench-full` from benchmarks/results/*.json. "
        "All figures are ratios measured in one run,\nboth sides taking turns: median, and the range in brackets. "
        "Virtual cores are noisy; absolute rates say little.\n\n"
    )
    PAGE.write_text(head + "\n\n".join(section(result) for result in found) + "\n", encoding="utf-8")


def main() -> None:
    for name in NAMES:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=True)
    write_page()
    print(f"\nWritten: {PAGE}")


if __name__ == "__main__":
    main()
