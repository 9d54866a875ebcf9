"""What a person finds in MLflow beside numbers: what a run is, what it was trained on, and its network's card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.run.datasets import Datasets

# A tag of MLflow has room for 8000 characters.
_ROWS = 48
_METRICS = """\
Charts: `val/` the vote of the network, `layer/NN/` each layer alone, `train/` loss and speed, `stage/N/` what each
stage does with its time (fractions, together 1), `data/` loading, `start/` seconds to the first step; `system/` (on the
page System metrics) memory and cores of each worker."""


def note(values: Mapping[str, Any], plan: Mapping[str, Any], datasets: Datasets, folder: str) -> str:
    """The description of a run, Markdown. `plan` as `Plan.to_json` with `layer_names`."""
    names = plan["layer_names"]
    train, objective = values["train"], values["objective"]["name"]
    parameters = sum(stage["parameters"] for stage in plan["stages"])
    length = next(f"{train[key]} {key}" for key in ("epochs", "steps", "samples") if train.get(key) is not None)
    rows = [
        f"| {s['index']} | {names[s['layers'][0]]} .. {names[s['layers'][1]]} | {s['replicas']} | {s['parameters']:,} |"
        for s in plan["stages"][:_ROWS]
    ]
    return "\n".join(
        [
            f"**{values['name']}**: {_network(values, len(names))}, {parameters:,} parameters, trained by "
            f"`{objective}` on {len(datasets.train.subset):,} images of {len(datasets.classes):,} classes for {length} "
            f"in batches of {train['global_batch_size']}, seed {train['seed']}.",
            "",
            "| stage | layers | replicas | parameters |",
            "|---|---|---|---|",
            *rows,
            "",
            _METRICS,
            "",
            f"Folder `{folder}`: `orchestrator report {folder}` makes its page; the command that started it goes on "
            "where it was interrupted.",
        ]
    )


def _network(values: Mapping[str, Any], layers: int) -> str:
    model = values["model"]
    name = model.get("backbone") or model.get("class") or model.get("arch")
    return f"`{name}` of {layers} {'layer' if layers == 1 else 'layers'}"


def dataset_inputs(values: Mapping[str, Any], datasets: Datasets) -> list[dict[str, str]]:
    """The sets of a run as MLflow wants them: name, digest, source and profile, with what each is for."""
    parts = {
        "training": ("train", datasets.train),
        "validation": ("val", datasets.val),
        "test": ("test", datasets.test),
    }
    found = []
    for context, (key, part) in parts.items():
        if part is None:
            continue
        held_out = isinstance(values["data"].get(key), dict)
        source = str(values["data"]["train" if held_out else key])
        profile = {
            "num_rows": len(part.subset),
            "num_classes": len(part.index.classes),
            "index_sha256": part.index.sha256,
        }
        found.append(
            {
                "context": context,
                "name": source.rstrip("/").rpartition("/")[2] + (" (held out)" if held_out else ""),
                "digest": part.index.sha256[:36],  # MLflow takes no more
                "source": json.dumps({"uri": source}),
                "profile": json.dumps(profile),
            }
        )
    return found


def model_card(summary: Mapping[str, Any], values: Mapping[str, Any], classes: Sequence[str], parameters: int) -> str:
    """What the network is, how good it is, what goes in and comes out, and what nobody has looked at. Markdown."""
    data = values["data"]
    size, channels = data["image_size"], data["channels"]
    scores = {
        f"{part} top-{k}": summary[f"{part}_top{k}"] for part in ("val", "test") for k in (1, 5)
    }  # fmt: skip
    shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in scores.items() if value is not None)
    listed = ", ".join(classes[:20]) + (f", ... ({len(classes)})" if len(classes) > 20 else "")
    layers = [f"| {x['index']} | {x['name']} | {_percent(x['val_top1'])} |" for x in summary["layers"]]
    return "\n".join(
        [
            f"# {summary['name']}",
            "",
            f"{_network(values, len(layers))}, {parameters:,} parameters, trained by `{values['objective']['name']}`: "
            + ("end to end." if values["objective"]["name"] == "bp" else "every layer by its own loss."),
            "",
            f"**Accuracy** {shown or 'was not measured'}; of the final weights, seed {summary['seed']}.",
            "",
            "| layer | name | val top-1 |",
            "|---|---|---|",
            *layers,
            "",
            f"**Input** images of {size} x {size} pixels, {'gray' if channels == 1 else 'RGB'}, uint8; JPEG and PNG "
            "files of other sizes are resized and cropped as in training. Normalisation is part of the network.",
            f"**Output** a score per class: {listed}.",
            f"**Trained on** `{data['train']}` (index {summary['index_sha256'][:12]}), "
            f"{summary['samples_per_epoch']:,} images, {summary['steps']:,} steps. "
            f"Weights {summary['weights_sha256'][:12]}, order of samples {summary['order_sha256'][:12]}.",
            "**Not looked at** other data than these, bias between groups of people or places, images made to deceive.",
            "",
            f'    model = mlflow.pyfunc.load_model("runs:/{summary["run_id"]}/network")',
            '    model.predict(np.array([open("a.jpg", "rb").read()], dtype=object))',
            "",
        ]
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
