"""Relations between the values of a job that no single value can break."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.job import backbones, cluster_rules, network, objective_rules
from orchestrator.job.objective_rules import Found
from orchestrator.job.show import show

if TYPE_CHECKING:
    from orchestrator.job.schema import Job


@dataclass(frozen=True)
class Finding:
    """A broken relation: the key to change, what it must be, and the keys that it was computed from."""

    key: str
    text: str
    needs: tuple[str, ...]


def check(job: Job) -> list[Finding]:
    """All broken relations of a job whose single values are fine."""
    return [Finding(key, text, needs) for needs, rule in RULES for key, text in rule(job)]


def _duration(job: Job) -> Found:
    given = [k for k in ("epochs", "steps", "samples") if getattr(job.train, k) is not None]
    if len(given) != 1:
        yield (
            "train",
            f"must have exactly one of epochs, steps and samples, got {_and(given) if given else 'none'}",
        )


def _warmup(job: Job) -> Found:
    train = job.train
    if train.warmup_epochs is not None and train.warmup_steps is not None:
        yield "train", "must have at most one of warmup_epochs and warmup_steps, got both"
        return
    if sum(x is not None for x in (train.epochs, train.steps, train.samples)) != 1:
        return
    if train.warmup_epochs is not None:
        run = _epochs(job)
        if run is not None and train.warmup_epochs > run:
            length = f"{run:g} epochs" if train.epochs else f"about {run:.3g} epochs"
            yield (
                "train.warmup_epochs",
                f"must not be longer than the run of {length}, got {train.warmup_epochs:g}",
            )
    if train.warmup_steps is not None:
        steps = _steps(job)
        if steps is not None and train.warmup_steps > steps:
            yield (
                "train.warmup_steps",
                f"must not be longer than the run of {steps} steps, got {train.warmup_steps}",
            )


def _steps_per_epoch(job: Job) -> int | None:
    samples = network.known_train_samples(job)
    return None if samples is None else max(1, math.ceil(samples / job.train.global_batch_size))


def _epochs(job: Job) -> float | None:
    train = job.train
    if train.epochs is not None:
        return float(train.epochs)
    per_epoch = _steps_per_epoch(job)
    steps = _steps(job)
    return None if per_epoch is None or steps is None else steps / per_epoch


def _steps(job: Job) -> int | None:
    train = job.train
    if train.steps is not None:
        return train.steps
    if train.samples is not None:
        return math.ceil(train.samples / train.global_batch_size)
    per_epoch = _steps_per_epoch(job)
    return None if per_epoch is None or train.epochs is None else train.epochs * per_epoch


def _batch(job: Job) -> Found:
    """A run refuses the batch too: it alone knows the number where images are held out, to one of each class."""
    samples, batch = network.known_train_samples(job), job.train.global_batch_size
    if samples is None:
        return
    whole = job.model.vote != "fitted" and (job.data.val is None or isinstance(job.data.val, str))
    if batch > samples + (0 if whole else network.known_classes(job) or 0):
        most = (
            f"the {samples} training samples"
            if whole
            else f"about {samples}, the training samples that are not held out"
        )
        yield "train.global_batch_size", f"must be at most {most}, got {batch}"


def _layers(job: Job) -> Found:
    size = job.data.image_size
    if network.own_model(job) is None or any(objective_rules.aux_convs(job)):
        return
    try:
        shapes = network.layer_shapes(job, network.known_classes(job))
    except ValueError as error:
        yield "model", f"must fit images of {job.data.channels}x{size}x{size}, got: {error}"
        return
    grid, largest = getattr(job.model, "head_grid", 1), max(max(shape.output[1:], default=1) for shape in shapes)
    # The default means at most so many cells, whatever the maps.
    if grid > largest and grid != type(job.model).model_fields["head_grid"].default:
        yield "model.head_grid", f"must be at most {largest}, the side of the largest map behind a layer, got {grid}"


def _votes(job: Job) -> Found:
    vote, layers = job.model.vote, network.units(job)
    if vote == "fitted" and job.objective.name == "bp":
        yield "model.vote", "must be last with objective bp, which has one head, got 'fitted'"
    if isinstance(vote, str):
        return
    if layers is not None and len(vote) != layers:
        yield "model.vote", f"must have one weight for each of the {layers} {network.unit_words(job)}, got {len(vote)}"
    elif not any(vote):
        yield "model.vote", f"must have a weight > 0, got {show(list(vote))}"


def _channels(job: Job) -> Found:
    for key in ("mean", "std"):
        count = len(getattr(job.data, key))
        if count != job.data.channels and not (count == 0 and network.backbone_model(job)):
            yield f"data.{key}", f"must have one number per channel ({job.data.channels}), got {count}"


def _augment(job: Job) -> Found:
    # A size of 0 is the backbone's own, which its library alone knows.
    augment, size = job.data.augment, job.data.image_size or 4096
    if augment.resized_crop is not None:
        low, high = augment.resized_crop
        if low > high:
            yield (
                "data.augment.resized_crop",
                f"must be [least area, greatest area], got {show([low, high])}",
            )
        if augment.crop_padding:
            yield "data.augment.crop_padding", f"must be 0 beside resized_crop, got {augment.crop_padding}"
    jitter = augment.color_jitter
    for key in ("saturation", "hue"):
        if job.data.channels == 1 and getattr(jitter, key):
            yield f"data.augment.color_jitter.{key}", f"must be 0 with data.channels 1, got {getattr(jitter, key):g}"
    for key in ("crop_padding", "cutout"):
        if getattr(augment, key) > size:
            yield (
                f"data.augment.{key}",
                f"must be at most data.image_size ({size}), got {getattr(augment, key)}",
            )


def _progressive(job: Job) -> Found:
    """A network takes smaller images where nothing that learns changes its shape: kernels do not, heads may."""
    wanted, full = job.data.progressive, job.data.image_size
    if wanted is None:
        return
    if network.own_model(job) is None:
        yield (
            "data.progressive",
            f"must be left out with a backbone or a model file, got {wanted.from_size} pixels",
        )
    elif job.train.epochs is None:
        yield (
            "data.progressive",
            f"must be left out unless train.epochs gives the length, got {wanted.from_size} pixels",
        )
    elif wanted.from_size > full:
        yield "data.progressive.from_size", f"must be at most data.image_size ({full}), got {wanted.from_size}"
    else:
        least = next(size for size in range(wanted.from_size, full + 1) if network.same_weights_at(job, size))
        if least > wanted.from_size:
            remedy = "a smaller model.head_grid or fewer pool_after allow less"
            yield "data.progressive.from_size", f"must be at least {least} ({remedy}), got {wanted.from_size}"


def _mixing(job: Job) -> Found:
    """Mixed images have two labels, which Forward-Forward cannot draw and a frozen backbone's kept features lack."""
    for key in ("mixup", "cutmix"):
        value = getattr(job.data.augment, key)
        if value and job.objective.name == "ff":
            yield f"data.augment.{key}", f"must be 0 with objective ff, which draws one label in, got {value:g}"
        elif value and getattr(job.objective, "similarity", 0):
            yield f"data.augment.{key}", f"must be 0 with objective.similarity, which knows one label, got {value:g}"
        elif value and network.cached_features(job) is not None:
            yield f"data.augment.{key}", f"must be 0 with cached features (or set features.cache: false), got {value:g}"


def _backbone(job: Job) -> Found:
    model = network.backbone_model(job)
    if model is None:
        return
    fault = backbones.fault(model.backbone)
    if fault:
        yield "model.backbone", fault
    if network.block_size(job) != 1:
        text = f"must be 1 (its units are the backbone's stages: model.heads_at), got {network.block_size(job)}"
        yield "objective.block_size", text


def _views(job: Job) -> Found:
    features = network.cached_features(job)
    if features is None:
        return
    augment, views = job.data.augment, features.views
    random = augment.flip or augment.crop_padding or augment.cutout or augment.resized_crop is not None
    random = random or augment.rand_augment is not None or any(dict(augment.color_jitter).values())
    if random and views == 1:
        yield (
            "features.views",
            "must be at least 2 with random data.augment, which changes what the frozen backbone computes "
            "(that many versions of each image are kept; or set features.cache to false), got 1",
        )
    elif views > 1 and not random:
        yield "features.views", f"must be 1 without data.augment (all views would be the same), got {views}"


def _digits(job: Job) -> Found:
    expect = job.data.expect
    if job.data.train != "digits" or expect is None:
        return
    if expect.classes != network.DIGITS_CLASSES:
        yield "data.expect.classes", f"must be {network.DIGITS_CLASSES} for digits, got {expect.classes}"
    if expect.train_samples != network.DIGITS_IMAGES:
        text = f"must be {network.DIGITS_IMAGES} for digits, got {expect.train_samples}"
        yield "data.expect.train_samples", text


def _expected_val(job: Job) -> Found:
    expect = job.data.expect
    if expect is not None and expect.val_samples is not None and not isinstance(job.data.val, str):
        yield (
            "data.expect.val_samples",
            f"must be left out when data.val is no data set, got {expect.val_samples}",
        )


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


_DURATION = ("train.epochs", "train.steps", "train.samples")
_WARMUP = ("train.warmup_epochs", "train.warmup_steps", "train.global_batch_size")
_UNITS = (
    *("model.arch", "model.widths", "model.layers", "model.heads_at", "model.top_widths"),
    *("objective.name", "objective.block_size"),
)
_MESH = ("cluster.workers", "cluster.stages", "cluster.replicas", *_UNITS)

RULES: tuple[tuple[tuple[str, ...], Callable[[Job], Found]], ...] = (
    (_DURATION, _duration),
    ((*_DURATION, *_WARMUP, "data.train", "data.val", "data.expect"), _warmup),
    (
        ("objective.name", "cluster.stages", "cluster.replicas", "cluster.layers", "train.schedule"),
        objective_rules.one_stage,
    ),
    (("objective.name", "model.norm", "model.backbone"), objective_rules.goodness),
    (("objective", "model"), objective_rules.own_class),
    (("objective", "model.arch", "model.backbone"), objective_rules.aux_convs),
    (("objective", "data.train", "data.expect", *_UNITS), objective_rules.coarse),
    (_MESH, cluster_rules.mesh),
    ((*_MESH, "train.global_batch_size"), cluster_rules.replicas),
    ((*_MESH, "cluster.layers"), cluster_rules.stage_layers),
    ((*_MESH, "cluster.min_workers", "cluster.layers", "cluster.launcher"), cluster_rules.elastic),
    (("train.micro_batches", "train.global_batch_size", "cluster.memory_gb"), cluster_rules.micro_batches),
    ((*_MESH, "train.global_batch_size", "model.norm", "model.top_norm"), cluster_rules.batch),
    (("model", "objective", "data.image_size", "data.channels", "data.expect.classes"), _layers),
    (("model.vote", *_UNITS), _votes),
    (("data.channels", "data.mean", "data.std"), _channels),
    (("data.augment", "data.image_size", "data.channels"), _augment),
    (("data.augment", "objective.name", "features", "model.freeze"), _mixing),
    (("data.progressive", "data.image_size", "train.epochs", "model", "objective"), _progressive),
    (("features", "data.augment", "model.freeze"), _views),
    (("objective",), objective_rules.scale),
    (("per_layer", "objective", *_UNITS), objective_rules.per_layer),
    (("model.backbone", "objective.name", "objective.block_size"), _backbone),
    (("data.train", "data.expect"), _digits),
    (("data.val", "data.expect"), _expected_val),
    (("cluster.transport", "cluster.use_gpu"), cluster_rules.transport),
    (("train.global_batch_size", "data.train", "data.val", "data.expect", "model.vote"), _batch),
)
