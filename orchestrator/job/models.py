"""The words of a job's `model` section, one class for each network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from orchestrator.job.section import Count, Decay, Natural, NonNegative, Section, Width, Words


class Model(Section):
    """What every network has: who decides the class. `fitted` weighs all layers' votes on held-out images."""

    vote: Literal["last", "equal", "fitted"] | Annotated[tuple[NonNegative, ...], Field(strict=False)] = "last"


class OwnModel(Model):
    """What every architecture of hff has: the widths of its layers."""

    arch: str
    widths: Annotated[tuple[Width, ...], Field(strict=False, min_length=1, max_length=1000)]


class MlpModel(OwnModel):
    """Fully connected layers."""

    arch: Literal["mlp"]
    norm: Literal["batch", "layer", "none"] = "batch"
    dropout: Decay = 0.0


class VggModel(OwnModel):
    """3 x 3 convolutions, some followed by a 2 x 2 max-pooling; `pool_after` counts layers from 0."""

    arch: Literal["vgg"]
    pool_after: Annotated[tuple[Natural, ...], Field(strict=False)] = ()
    first_kernel: Annotated[int, Field(ge=1, le=64)] = 3
    first_stride: Annotated[int, Field(ge=1, le=64)] = 1
    head_grid: Annotated[int, Field(ge=1, le=64)] = 4
    norm: Literal["batch", "group", "none"] = "batch"


class ResnetModel(VggModel):
    """The same layers, with a shortcut around each convolution but the first; it has no parameters."""

    arch: Literal["resnet"]  # type: ignore[assignment]


class FileModel(Model):
    """A network in a file of the user's, `class` in `file`; the keys that are not named here are its options.

    `sha256` is the hash of the file and `layers` the number of its bodies, noted when a job is read and started.
    """

    model_config = ConfigDict(extra="allow")

    arch: Literal["own"]
    file: Words
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    layers: Count | None = None
    head_grid: Annotated[int, Field(ge=1, le=64)] = 4


class BackboneModel(Model):
    """A timm backbone, split at its stages, with local heads and, on top, layers of our own.

    `pretrained` is true (weights from timm's hub), false (random) or a local .safetensors or .pth file. `freeze`
    is all, none, or how many stages from the bottom stay as they are. `heads_at` numbers stages from 0.
    """

    backbone: Words
    pretrained: bool | Words = True
    freeze: Literal["all", "none"] | Annotated[int, Field(ge=0, le=1000)] = "all"
    heads_at: (
        Literal["all", "last"] | Annotated[tuple[Natural, ...], Field(strict=False, min_length=1, max_length=1000)]
    ) = "all"
    head_grid: Annotated[int, Field(ge=1, le=64)] = 2
    top_widths: Annotated[tuple[Width, ...], Field(strict=False)] = ()
    top_norm: Literal["batch", "layer", "none"] = "batch"
