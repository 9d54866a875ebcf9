"""The words of a job file and what each may be: frozen, strict, no torch.

A `Job` that exists is valid: single values are held by their types, relations between them by `checks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.job import checks, paths
from orchestrator.job.models import BackboneModel, FileModel, MlpModel, Model, ResnetModel, VggModel
from orchestrator.job.objectives import AnyObjective
from orchestrator.job.section import (
    LARGE,
    Count,
    Decay,
    Natural,
    NonNegative,
    OpenShare,
    Positive,
    Section,
    Share,
    Words,
    words,
)


def _whole(value: Any) -> Any:
    """Python takes true and 1.0 for 1, and so does pydantic in a Literal."""
    if type(value) is not int:
        raise PydanticCustomError("whole", "must be a whole number")
    return value


def _run_name(text: str) -> str:
    if not paths.is_safe_name(text):
        raise PydanticCustomError(
            "name",
            "must be 1 to 100 letters, digits, dots, dashes and underscores, the first a letter or a digit",
        )
    return text


def _place(fault_of: Callable[[str], str | None]) -> AfterValidator:
    """Refuses a place in which a function finds a fault."""

    def check(text: str) -> str:
        fault = fault_of(text)
        if fault:
            raise PydanticCustomError("location", "{must}", {"must": fault})
        return text

    return AfterValidator(check)


RunName = Annotated[str, AfterValidator(_run_name)]
Location = Annotated[str, AfterValidator(words), _place(paths.location_fault)]
RunsFolder = Annotated[str, AfterValidator(words), _place(paths.runs_fault)]
RunAndStep = Annotated[str, AfterValidator(words), _place(paths.run_and_step_fault)]
TrackingUri = Annotated[str, AfterValidator(words), _place(paths.tracking_fault)]


class FromTrain(Section):
    """A part of the training images that is held out, the same share of each class."""

    from_train: OpenShare


class ColorJitter(Section):
    """Greatest random changes of colour: shares of what an image has, the hue as a share of the colour circle."""

    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class RandAugment(Section):
    """Operations of RandAugment (Cubuk et al. 2020) on each image, and how strong they are."""

    operations: Annotated[int, Field(ge=1, le=14)] = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class Augment(Section):
    """Random changes of a training image; lengths in pixels, areas as a share of the image.

    `mixup` and `cutmix` are the alpha of the Beta distribution that a batch's share of its own images is drawn from;
    with both, each batch gets one of the two.
    """

    crop_padding: Natural = 0
    flip: bool = False
    resized_crop: Annotated[tuple[Share, Share], Field(strict=False)] | None = None
    cutout: Natural = 0
    color_jitter: ColorJitter = ColorJitter()
    rand_augment: RandAugment | None = None
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0


class Progressive(Section):
    """Small training images first: from `from_size` pixels to `image_size` over the share `until` of the epochs."""

    from_size: Annotated[int, Field(ge=1, le=4096)]
    until: Share = 0.75


class Expect(Section):
    """What the index will say, so that a job can be checked and planned without its data."""

    train_samples: Count
    val_samples: Count | None = None
    classes: Annotated[int, Field(ge=2, le=LARGE)]


class Cache(Section):
    """Where shards of remote data are kept on each node, and how much of its disk they may take.

    Without `folder` it is below $XDG_CACHE_HOME or ~/.cache; without `max_bytes` half of what the disk has left.
    """

    folder: Words | None = None
    max_bytes: Annotated[int, Field(ge=1, le=2**53)] | None = None


class Data(Section):
    """Where the images are, and in which form and order they come."""

    train: Location
    val: Location | FromTrain | None = None
    test: Location | None = None
    image_size: Annotated[int, Field(ge=1, le=4096)]
    channels: Annotated[Literal[1, 3], BeforeValidator(_whole)] = 3
    lanes: Annotated[int, Field(ge=1, le=65536)] = 48
    shuffle_window: Count = 8192
    augment: Augment = Augment()
    crop_share: Share | None = None
    progressive: Progressive | None = None
    mean: Annotated[tuple[float, ...], Field(strict=False)]
    std: Annotated[tuple[Positive, ...], Field(strict=False)]
    loader_threads: Literal["auto"] | Annotated[int, Field(ge=0, le=1024)] = 1
    loader_processes: Annotated[int, Field(ge=0, le=1024)] = 0
    decoded_cache_mb: Natural = 512
    prefetch_batches: Annotated[int, Field(ge=1, le=1024)] = 4
    bad_sample_budget: Annotated[float, Field(ge=0, le=1)] = 0.0001
    shuffle_labels: bool = False
    repeat_batch: bool = False
    cache: Cache = Cache()
    expect: Expect | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        """Expand the shorthand `digits`; mean and spread default to 0.5 and 0.25 in each channel."""
        value = expand_digits(value)
        if not isinstance(value, dict):
            return value
        channels = 1 if value.get("channels", 3) == 1 else 3
        return {"mean": [0.5] * channels, "std": [0.25] * channels} | value


def expand_digits(value: Any) -> Any:
    """`data: digits` in full: scikit-learn's 8 x 8 gray digits, a quarter of them held out."""
    if value != "digits":
        return value
    return {"train": "digits", "val": {"from_train": 0.25}, "image_size": 8, "channels": 1}


class TransferData(Data):
    """Images for a timm backbone; size (0), mean and spread ([]) and framing are the backbone's own unless given."""

    image_size: Annotated[int, Field(ge=0, le=4096)] = 0
    channels: Annotated[Literal[3], BeforeValidator(_whole)] = 3
    mean: Annotated[tuple[float, ...], Field(strict=False)] = ()
    std: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        """`digits` in full, in the size and the colours that the backbone wants."""
        if value != "digits":
            return value
        return {key: v for key, v in expand_digits(value).items() if key not in ("image_size", "channels")}


class Train(Section):
    """How long and how: exactly one of epochs, steps, samples; one warm-up at most.

    A batch is computed in `micro_batches` parts, whose gradients are added: less memory, the same update but for
    rounding and for batch norms, which take the statistics of each part. `auto` takes as few as `cluster.memory_gb`
    allows. With `ema_decay` the weights that count are a running average of those that learn. With `link_precision`
    bfloat16 stages send half as much over gloo and NCCL; it is no key of `cluster` because it changes what is learned.
    """

    epochs: Count | None = None
    steps: Count | None = None
    samples: Annotated[int, Field(ge=1, le=2**53)] | None = None
    global_batch_size: Count
    micro_batches: Literal["auto"] | Count = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive
    weight_decay: NonNegative = 0.0
    momentum: Decay = 0.9
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    lr_schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    warmup_epochs: NonNegative | None = None
    warmup_steps: Natural | None = None
    schedule: Literal["simultaneous", "sequential"] = "simultaneous"
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    link_precision: Literal["same", "bfloat16"] = "same"
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    max_hours: Positive | None = None
    init_from: RunAndStep | None = None
    eval_every_epochs: Count = 1
    grad_clip: Positive | None = None
    ema_decay: Decay = 0.0
    compile: bool = False
    vote_from_train: OpenShare = 0.1


class PerLayer(Section):
    """What one layer has of its own instead of the values in `train` and `objective`."""

    lr: Positive | None = None
    weight_decay: NonNegative | None = None
    margin: Annotated[float, Field(ge=0, le=2)] | None = None
    scale: Positive | None = None
    sharpness: Positive | None = None
    label_smoothing: Decay | None = None
    prototypes_per_class: Annotated[int, Field(ge=1, le=1024)] | None = None


class Features(Section):
    """The frozen backbone's outputs, computed once and kept beside the runs; `views` augmented ones per image."""

    cache: bool = True
    views: Annotated[int, Field(ge=1, le=1000)] = 1
    dtype: Literal["float16", "float32"] = "float16"


class Cluster(Section):
    """Who computes; nothing here changes what is computed.

    `replicas` says how many workers share each stage, `layers` how many layers (or blocks) each has; without them the
    plan chooses. An elastic job, `workers: {min: 1, max: 4}` (here `min_workers` and `workers`), trains on as many as
    there is room for. `memory_gb` is what one worker may use; the two of `link` describe what joins them, for the plan.
    """

    launcher: Literal["ray", "process"] = "ray"
    workers: Annotated[int, Field(ge=1, le=65536)] = 1
    min_workers: Annotated[int, Field(ge=1, le=65536)] | None = None
    stages: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] = "auto"
    replicas: Annotated[tuple[Count, ...], Field(strict=False, min_length=1, max_length=1000)] | None = None
    layers: Annotated[tuple[Count, ...], Field(strict=False, min_length=1, max_length=1000)] | None = None
    memory_gb: Positive | None = None
    link_gbit_per_s: Positive | None = None
    link_latency_us: Positive | None = None
    threads_per_worker: Annotated[int, Field(ge=1, le=1024)] = 1
    cpus_per_worker: Positive = 1.0
    use_gpu: bool = False
    transport: Literal["auto", "shm", "gloo", "nccl"] = "auto"
    timeout_s: Positive = 300.0
    max_failures: Natural = 3
    max_preemptions: Natural = 100

    @model_validator(mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        """`workers: {min: A, max: B}` in full."""
        workers = value.get("workers") if isinstance(value, dict) else None
        if not isinstance(workers, dict) or set(workers) != {"min", "max"}:
            return value
        return value | {"min_workers": workers["min"], "workers": workers["max"]}


class Checkpoint(Section):
    """When a run saves, how many saved steps it keeps, and whether training goes on meanwhile."""

    every_steps: Count | None = None
    every_epochs: Count = 1
    keep_last: Count = 2
    background: bool = True


class Tracking(Section):
    """MLflow; without `uri` a database beside the runs. `registered_model` names the final network in the registry."""

    uri: TrackingUri | None = None
    experiment: Words = "orchestrator"
    registered_model: RunName | None = None
    trace_steps: Natural = 0


class Job(Section):
    """What every run has, whatever its kind; valid by construction."""

    kind: str
    name: RunName
    runs: RunsFolder = "runs"
    data: Data
    model: Model
    objective: AnyObjective
    train: Train
    per_layer: Annotated[tuple[PerLayer | None, ...], Field(strict=False, max_length=1000)] = ()
    cluster: Cluster = Cluster()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _relations(self) -> Self:
        found = checks.check(self)
        if found:
            text = "\n".join(f"{f.key}: {f.text}" for f in found)
            raise PydanticCustomError("relations", "{text}", {"text": text, "found": found})
        return self


class TrainJob(Job):
    """A network of our own, trained from its first weights."""

    kind: Literal["train"]
    model: Annotated[MlpModel | VggModel | ResnetModel | FileModel, Field(discriminator="arch")]


class TransferJob(Job):
    """Heads and layers on a timm backbone, frozen or fine-tuned, and the controls to compare them with."""

    kind: Literal["transfer"]
    data: TransferData
    model: BackboneModel
    features: Features = Features()
    controls: Annotated[
        tuple[Literal["linear-probe", "knn", "prototype-last", "heads-vote", "bp"], ...], Field(strict=False)
    ] = ()
