"""The words of a job's `objective` section, one class for each name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from orchestrator.job.section import LARGE, Decay, NonNegative, Positive, Section, Words

AuxConvs = Annotated[int, Field(ge=0, le=8)]
Coarse = Annotated[tuple[Annotated[int, Field(ge=2, le=LARGE)], ...], Field(strict=False)]


class HffObjective(Section):
    """Prototypes on the unit sphere, one loss per layer (or per block of `block_size` layers)."""

    name: Literal["hff"]
    prototypes_per_class: Annotated[int, Field(ge=1, le=1024)] = 1
    margin: Annotated[float, Field(ge=0, le=2)] = 0.0
    scale: Positive = 32.0
    scale_min: Positive = 16.0
    scale_max: Positive = 64.0
    learn_scale: bool = True
    sharpness: Positive = 10.0
    label_smoothing: Decay = 0.0
    block_size: Annotated[int, Field(ge=1, le=1000)] = 1
    similarity: NonNegative = 0.0
    aux_convs: AuxConvs = 0
    coarse: Coarse = ()


class CeObjective(Section):
    """A linear head with cross-entropy per layer (or per block of `block_size` layers)."""

    name: Literal["ce"]
    label_smoothing: Decay = 0.0
    block_size: Annotated[int, Field(ge=1, le=1000)] = 1
    similarity: NonNegative = 0.0
    aux_convs: AuxConvs = 0
    coarse: Coarse = ()


class FfObjective(Section):
    """The original Forward-Forward: the label in the input, goodness against a threshold in each layer."""

    name: Literal["ff"]
    threshold: Positive = 1.0
    sharpness: Positive = 10.0


class BpObjective(Section):
    """The control: one linear head behind the last layer, gradients through all layers."""

    name: Literal["bp"]
    label_smoothing: Decay = 0.0


class OwnObjective(Section):
    """A head in a file of the user's, `class` in `file`; the keys that are not named here are its options.

    `sha256` is the hash of the file, noted when a job is read, so that a run goes on with the same code alone.
    """

    model_config = ConfigDict(extra="allow")

    name: Literal["own"]
    file: Words
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    block_size: Annotated[int, Field(ge=1, le=1000)] = 1


AnyObjective = Annotated[
    HffObjective | FfObjective | CeObjective | BpObjective | OwnObjective, Field(discriminator="name")
]
