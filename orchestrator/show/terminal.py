"""The tables that a run shows before and after its training, as plain text; `follow` shows what is between."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.job.show import counted

# A prediction that the measured rate misses by no more than this factor needs no explanation.
_NEAR = 1.25


def as_text(table: Table, width: int = 110) -> str:
    """A table as plain text, as wide as it needs to be, at most `width` columns."""
    buffer = io.StringIO()
    # Cells are data: rich would take [a] in a class's name for a style and :a: for a picture.
    plain = Console(file=buffer, width=width, color_system=None, legacy_windows=False, markup=False, emoji=False)
    plain.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def amount(number: float, unit: str = "") -> str:
    """A number with three figures and a letter: 1234567 -> 1.23 M."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * limit:  # what three figures would round up to it
            return f"{number / limit:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def layers_text(stage: Mapping[str, Any], layer_names: Sequence[str]) -> str:
    """The layers of a stage: `conv0`, `conv0 .. conv2`."""
    first, last = stage["layers"]
    return layer_names[first] if first == last else f"{layer_names[first]} .. {layer_names[last]}"


def plan_table(plan: dict[str, Any], layer_names: Sequence[str], *, job_name: str) -> str:
    """Who owns what: one row per stage."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    for column, justify in (
        ("stage", "right"),
        ("layers", "left"),
        ("replicas", "right"),
        ("parameters", "right"),
        ("memory", "right"),
        ("compute", "right"),
        ("sent per step", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for stage in plan["stages"]:
        first, last = stage["layers"]
        table.add_row(
            str(stage["index"]),
            f"{first}-{last}  {layers_text(stage, layer_names)}",
            str(stage["replicas"]),
            amount(stage["parameters"]),
            amount(stage["memory_bytes"], "B"),
            f"{100 * stage['compute_share']:.0f} %",
            amount(stage["bytes_sent_per_step"], "B"),
        )
    head = (
        f"Plan of {job_name}: {counted(plan['workers'], 'worker')}, {counted(len(plan['stages']), 'stage')}, "
        f"batches of {plan['global_batch_size']}, {counted(plan['steps_per_epoch'], 'step')} per epoch"
    )
    tail = (
        f"Predicted {amount(plan['images_per_second'])} images/s, scaling {plan['efficiency']:.2f} "
        f"(1: the speed of one worker times {plan['workers']}); "
        f"stage {plan['limiting_stage']} sets the pace{_because(plan)}."
    )
    return f"{head}\n{as_text(table)}\n{tail}"


def _because(plan: dict[str, Any]) -> str:
    factor = plan["limiting_factor"]
    return "" if factor == "none" else f"; most is lost to {factor} ({100 * plan['losses'][factor]:.0f} %)"


def scaling_table(plans: Sequence[dict[str, Any]], *, job_name: str, price_per_hour: float | None = None) -> str:
    """What to expect of each number of workers, one row each; `price_per_hour` is that of one worker."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    columns = ["workers", "replicas", "images/s", "scaling", "epoch", "hours"]
    columns += [] if price_per_hour is None else ["cost"]
    for column in (*columns, "memory", "slowest", "most is lost to"):
        justify: Any = "left" if column in ("replicas", "most is lost to") else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for plan in plans:
        stages = plan["stages"]
        hours = plan["worker_hours_per_epoch"]
        factor = plan["limiting_factor"]
        lost = "" if factor == "none" else f"{factor} {100 * plan['losses'][factor]:.0f} %"
        table.add_row(
            str(plan["workers"]),
            " ".join(str(stage["replicas"]) for stage in stages),
            amount(plan["images_per_second"]),
            f"{plan['efficiency']:.3f}",
            duration(plan["epoch_seconds"]),
            f"{hours:.3g}",
            *([] if price_per_hour is None else [f"{hours * price_per_hour:.2f}"]),
            amount(max(stage["memory_bytes"] for stage in stages), "B"),
            str(plan["limiting_stage"]),
            lost,
        )
    head = f"Predicted for {job_name}, batches of {plans[0]['global_batch_size']}:"
    tail = (
        "replicas: of each stage; scaling: images/s over those of one worker times workers; hours: of all workers, an\n"
        "epoch; memory: of the largest worker; slowest: its stage"
    )
    return f"{head}\n{as_text(table, width=140)}\n{tail}"


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3:05 or 2:03:04."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def result_table(
    summary: dict[str, Any], run_dir: Path | str, tracking_uri: str, *, predicted: float | None = None
) -> str:
    """Accuracy of every layer, the numbers of the whole, and where to look next.

    `predicted`: the images/s of the plan, to stand beside those that were measured.
    """
    table = Table(box=None, pad_edge=False)
    votes = [f"{weight:.3f}" for weight in summary.get("vote_weights", [])]
    for column in ("layer", "name", "stage", "val top-1", *(["vote"] if votes else [])):
        table.add_column(column, justify="left" if column == "name" else "right")
    for layer in summary["layers"]:
        row = (str(layer["index"]), layer["name"], str(layer["stage"]), percent(layer["val_top1"]))
        table.add_row(*row, *votes[layer["index"] : layer["index"] + 1])
    lines = [f"Result of {summary['name']}", as_text(table)]
    lines += [_accuracies(summary)] if _accuracies(summary) else []
    rate, busy = summary["images_per_second"], summary["pipeline_efficiency"]
    facts = [f"{counted(summary['steps'], 'step')} in {duration(summary['wall_seconds'])}"]
    plan = "" if predicted is None else f" (predicted {amount(predicted)})"
    facts += [] if rate is None else [f"{rate:.0f} images/s{plan}"]
    # Not the plan's scaling: this one compares a run with its own slowest stage, that one with a single worker.
    facts += [] if busy is None else [f"pipeline efficiency {busy:.2f} (1: the slowest stage never waits)"]
    lines.append(", ".join([*facts, f"attempt {summary['attempts']}"]))
    if rate and predicted and not 1 / _NEAR <= rate / predicted <= _NEAR:
        lines.append("The prediction rests on FLOPs and bytes; orchestrator plan JOB --profile times the layers here")
    lines.append(f"Run folder   {run_dir}")
    lines.append(f"Report       {program('orchestrator')} report {shlex.quote(str(run_dir))}")
    if tracking_uri.startswith("sqlite"):
        lines.append(f"MLflow       {program('mlflow')} ui --backend-store-uri {shlex.quote(tracking_uri)}")
    else:
        lines.append(f"MLflow       {tracking_uri}")
    return "\n".join(lines)


def program(name: str) -> str:
    """How a program of this environment is called here: by its name where the shell finds it, else by its path."""
    own = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not own.exists() or (found is not None and os.path.samefile(found, own)):
        return name
    beside = os.path.relpath(own)
    return shlex.quote(str(own) if beside.startswith("..") else beside)


def _accuracies(summary: Mapping[str, Any]) -> str:
    """The accuracies of the whole network that were measured."""
    parts = []
    for name in ("val", "test"):
        found = [f"top-{k} {percent(v)}" for k in (1, 5) if (v := summary[f"{name}_top{k}"]) is not None]
        parts += [f"{name} {', '.join(found)}"] if found else []
    return "; ".join(parts)


def stages_table(event: Mapping[str, Any], layer_names: Sequence[str]) -> str:
    """Where the time of each stage went, and the slow one with its remedy."""
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "layers", "replicas", "busy", "waits for input", "for output", "for sums over replicas"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for i, stage in enumerate(event["stages"]):
        shares = (stage[f"{key}_fraction"] for key in ("busy", "wait_input", "wait_output", "all_reduce"))
        told = (f"{100 * share:.0f} %" for share in shares)
        table.add_row(str(i), layers_text(stage, layer_names), str(stage["replicas"]), *told)
    return "\n".join(["Time of the stages", as_text(table), *([event["advice"]] if event["advice"] else [])])


def controls_table(summary: dict[str, Any]) -> str:
    """The run and its controls, a row each."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "val top-1", "test top-1", "training"):
        table.add_column(column, justify="left" if not column else "right")
    own = {**summary, "seconds": summary["wall_seconds"]}
    for name, row in {summary["name"]: own, **summary["controls"]}.items():
        table.add_row(name, percent(row["val_top1"]), percent(row["test_top1"]), duration(row["seconds"]))
    return f"Controls of {summary['name']}\n{as_text(table)}"
