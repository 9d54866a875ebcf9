"""timm backbones: what they are fed with, how they are built, where they are cut. The only room that knows timm."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hff.measured import Measured, measure
from hff.randomness import derive_seed, seeded
from hff.shapes import Shape
from orchestrator.errors import JobError, OrchestratorError
from orchestrator.transfer import weights
from orchestrator.transfer.trunk import NotAChain, TrunkStage, chain, find_cuts, split


@dataclass(frozen=True)
class InputForm:
    """How a backbone wants its images, from its own `pretrained_cfg`."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_share: float
    interpolation: str


@dataclass(frozen=True)
class TrunkShape:
    """All stages, and the number of tokens at the front that stand for no place in the image."""

    input: Shape
    stages: tuple[Measured, ...]
    prefix_tokens: int


def input_form(backbone: str) -> InputForm:
    """Size, normalisation and framing that the backbone's weights were trained with."""
    config = _on_meta(backbone, None).pretrained_cfg
    return InputForm(
        image_size=int(config["input_size"][-1]),
        mean=tuple(float(x) for x in config["mean"]),
        std=tuple(float(x) for x in config["std"]),
        crop_share=float(config.get("crop_pct") or 0.875),
        interpolation=str(config.get("interpolation") or "bicubic"),
    )


@functools.cache
def trunk_shape(backbone: str, image_size: int) -> TrunkShape:
    """The stages of a backbone for square images, without its weights. Raises JobError when it cannot be cut."""
    model = _on_meta(backbone, image_size)
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    stages = _split(model, backbone, image_size)
    x = _image(image_size)
    shapes = []
    for stage in stages:
        x, shape = measure(stage, x)
        shapes.append(shape)
    tokens = [s.output[0] - prefix for s in shapes if len(s.output) == 2]
    if any(math.isqrt(n) ** 2 != n for n in tokens):
        raise JobError(f"model.backbone: {backbone} cannot be used: its {tokens[0]} tokens are no square map")
    return TrunkShape((3, image_size, image_size), tuple(shapes), prefix)


def build_trunk(backbone: str, pretrained: bool | str, image_size: int, seed: int) -> list[TrunkStage]:
    """The stages of a backbone, float32 on the CPU, with random, published or given weights.

    Random weights depend on `seed` alone. Raises CheckpointError when a file does not fit, OrchestratorError when
    the hub cannot be reached.
    """
    with seeded(derive_seed(seed, "init", "trunk")):
        model = _create(backbone, image_size, hub=pretrained is True)
    stages = _split(model, backbone, image_size)
    if isinstance(pretrained, str):
        weights.load(pretrained, backbone, stages, functools.partial(_whole_names, backbone))
    return stages


def check_weights(backbone: str, pretrained: bool | str, image_size: int) -> str:
    """Get the weights once, before workers do; returns a line about them. Raises as `build_trunk` does."""
    if isinstance(pretrained, str):
        stages = _split(_create(backbone, image_size, hub=False), backbone, image_size)
        return weights.load(pretrained, backbone, stages, functools.partial(_whole_names, backbone))
    _create(backbone, image_size, hub=pretrained)
    return f"{backbone}, from timm's hub" if pretrained else f"{backbone}, random"


def _create(backbone: str, image_size: int | None, *, hub: bool) -> Any:
    """A timm model without its classifier. Raises JobError for a name or a size that timm refuses."""
    import timm  # takes 10 s; workers of a run without a backbone read this module too

    options: dict[str, Any] = {"num_classes": 0, "pretrained": hub}
    try:
        if image_size is not None and timm.get_pretrained_cfg_value(backbone, "fixed_input_size"):
            options["img_size"] = image_size
        return timm.create_model(backbone, **options)
    except Exception as error:
        # timm and its hub raise whatever their libraries do; for us they mean one of two things.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if hub:
            raise OrchestratorError(
                f"model.pretrained: the weights of {backbone} cannot be fetched from the hub ({reason}); give a local "
                "file (model.pretrained: weights.safetensors) or run once where the hub can be reached"
            ) from error
        raise JobError(f"model.backbone: {backbone} cannot be built for images of {image_size}: {reason}") from error


def _on_meta(backbone: str, image_size: int | None) -> Any:
    with torch.device("meta"):
        return _create(backbone, image_size, hub=False).eval()


def _image(image_size: int) -> Tensor:
    return torch.empty(1, 3, image_size, image_size, device="meta")


def _split(model: Any, backbone: str, image_size: int) -> list[TrunkStage]:
    """Cut a model where its twin on the meta device can be cut."""
    twin = _on_meta(backbone, image_size)
    info = getattr(twin, "feature_info", None)
    try:
        links, called = _observed(twin, backbone, image_size)
        cuts = find_cuts(links, getattr(info, "info", info))
    except NotAChain as error:
        raise JobError(
            f"model.backbone: {backbone} cannot be cut into stages: {error}; resnet, convnext, regnet, efficientnet, "
            "vit, swin and most other families can"
        ) from error
    return split(model, cuts, called=called)


def _observed(twin: Any, backbone: str, image_size: int) -> tuple[list[str], set[str]]:
    try:
        return chain(twin, _image(image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise JobError(f"model.backbone: {backbone} does not take images of {image_size}: {error}") from error


def _whole_names(backbone: str) -> tuple[set[str], Any]:
    """Names of all tensors of the complete model, classifier included, and timm's own repair of older files."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(backbone)
    repair = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return set(model.state_dict()), repair
