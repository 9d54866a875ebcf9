"""From the job's words to the network: the one place that reads `model` and `objective`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from hff import shapes
from hff.architectures import AnyHead, HeadOptions, build_layers
from hff.layers import LocalLayer
from hff.network import vote_weights
from orchestrator.job.own_code import is_own
from orchestrator.job.per_layer import of_layer
from orchestrator.run.inference.classifier import framing
from orchestrator.run.own_code import with_source
from orchestrator.run.own_head import own_head
from orchestrator.run.own_network import own_architecture

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


def architecture(model: dict[str, Any]) -> Any:
    """The architecture's frozen options from the resolved `model` section of a job."""
    options: Any = shapes.ARCHITECTURES[model["arch"]]
    known = {f.name for f in fields(options)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items() if k in known}
    return options(**values)


def head_options(objective: dict[str, Any], num_classes: int) -> AnyHead:
    """The local heads that the resolved `objective` section asks for."""
    if objective["name"] == "own":
        return own_head(objective, num_classes)
    if objective["name"] == "ff":
        threshold, sharpness = objective["threshold"], objective["sharpness"]
        return HeadOptions(kind="goodness", num_classes=num_classes, threshold=threshold, sharpness=sharpness)
    known = {f.name for f in fields(HeadOptions)} - {"kind", "num_classes"}
    return HeadOptions(
        kind="prototype" if objective["name"] == "hff" else "linear",
        num_classes=num_classes,
        **{k: v for k, v in objective.items() if k in known},
    )


def build(
    model: dict[str, Any],
    objective: dict[str, Any],
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    seed: int,
    precision: str = "float32",
    only: Iterable[int] | None = None,
    per_layer: Sequence[Mapping[str, Any] | None] = (),
    pretrained: bool = True,
    superclasses: Sequence[Sequence[int]] = (),
) -> list[LocalLayer]:
    """Build the layers of a job, or those numbered in `only`; the bits of a layer depend on `seed` alone.

    `per_layer` says in what the heads differ from `objective`; `superclasses` has, for the first layers, the
    super-class of every class, which is what they learn. A backbone's bits depend on its weights' file too;
    without `pretrained` it is left random, for a checkpoint that will fill it.
    """

    def head(index: int) -> AnyHead:
        made = head_options(of_layer(objective, per_layer, index), num_classes)
        if isinstance(made, HeadOptions) and index < len(superclasses):
            made = replace(made, groups=tuple(superclasses[index]))
        return made

    end_to_end = objective["name"] == "bp"
    if "backbone" in model:
        from orchestrator.transfer.units import build_units

        layers = build_units(
            model,
            head,
            image_size=input_shape[1],
            seed=seed,
            end_to_end=end_to_end,
            only=only,
            pretrained=pretrained,
        )
    else:
        options: Any = own_architecture(model) if is_own(model) else architecture(model)
        bodies = options.depth if is_own(model) else len(model["widths"])
        layers = build_layers(
            options,
            input_shape,
            [head(index) for index in range(bodies)],
            seed=seed,
            block_size=objective.get("block_size", 1),
            end_to_end=end_to_end,
            only=only,
        )
    return [layer.to(DTYPES[precision]) for layer in layers]


def votes(model: dict[str, Any], layers: int, depth: int, fitted: Sequence[float] | None = None) -> tuple[float, ...]:
    """Weight of each layer's vote when the first `depth` of `layers` layers are trained.

    `fitted` are the weights of `vote: fitted`; until they are there, the last trained layer decides.
    """
    vote: str | Sequence[float] = model.get("vote", "last")
    if vote == "fitted":
        vote = "last" if fitted is None else fitted
    if not isinstance(vote, str):
        vote = list(vote)[:depth] if any(list(vote)[:depth]) else "last"
    return (*vote_weights(vote, depth), *([0.0] * (layers - depth)))


def description(job: dict[str, Any], classes: Sequence[str], state: dict[str, Any] | None = None) -> dict[str, Any]:
    """All that is needed to rebuild a trained network from its layer files.

    `state` is that of the checkpoint with the files; vote weights in it, found by the run, stand above
    the job's word for them.
    """
    data = {key: job["data"][key] for key in ("image_size", "channels", "mean", "std")} | framing(job["data"])
    return {
        "name": job["name"],
        "model": with_source(job["model"]),
        "objective": with_source(job["objective"]),
        "per_layer": job["per_layer"],
        "data": data,
        "precision": job["train"]["precision"],
        "classes": list(classes),
        "vote_weights": (state or {}).get("vote_weights"),
    }


def rebuild(description: Mapping[str, Any]) -> list[LocalLayer]:
    """Layers of the described network, with weights yet to be filled in."""
    size = description["data"]["image_size"]
    return build(
        description["model"],
        description["objective"],
        input_shape=(description["data"]["channels"], size, size),
        num_classes=len(description["classes"]),
        seed=0,
        precision=description["precision"],
        per_layer=description["per_layer"],
        pretrained=False,
    )
