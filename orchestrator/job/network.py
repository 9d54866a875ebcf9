"""From a job's `model` and `objective` to the shapes of its layers, without torch."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hff.shapes import HeadShape, LayerShape
    from orchestrator.job.models import BackboneModel, FileModel, OwnModel
    from orchestrator.job.schema import Features, Job

ASSUMED_CLASSES = 10
DIGITS_CLASSES = 10
DIGITS_IMAGES = 1797
# A handful of weights is well determined by so many images; more would only be lost for training.
MOST_VOTE_SAMPLES = 5000


def known_classes(job: Job) -> int | None:
    """The number of classes as far as the job itself tells it."""
    if job.data.expect is not None:
        return job.data.expect.classes
    return DIGITS_CLASSES if job.data.train == "digits" else None


def known_train_samples(job: Job) -> int | None:
    """Images per epoch as far as the job itself tells it, without the held-out parts (to one per class)."""
    if job.data.expect is not None:
        samples = job.data.expect.train_samples
    elif job.data.train == "digits":
        samples = DIGITS_IMAGES
    else:
        return None
    samples -= round(samples * getattr(job.data.val, "from_train", 0.0))
    share = vote_share(job.model.vote, job.train.vote_from_train, samples)
    return samples - round(samples * (share or 0.0))


def vote_share(vote: object, wanted: float, samples: int) -> float | None:
    """The share of the training images that vote weights are fitted on; None when they are not fitted."""
    return min(wanted, MOST_VOTE_SAMPLES / samples) if vote == "fitted" else None


def head_shape(job: Job, num_classes: int | None, layer: int = 0) -> HeadShape:
    """The head of a layer; with unknown classes, of 10."""
    from hff.shapes import HeadShape

    classes = ASSUMED_CLASSES if num_classes is None else num_classes
    if job.objective.name == "ff":
        return HeadShape("goodness", classes)
    aux_convs = getattr(job.objective, "aux_convs", 0)
    if job.objective.name != "hff":
        return HeadShape("linear", classes, 1, aux_convs)
    own = job.per_layer[layer] if layer < len(job.per_layer) else None
    count = None if own is None else own.prototypes_per_class
    return HeadShape("prototype", classes, count or job.objective.prototypes_per_class, aux_convs)


def layer_shapes(job: Job, num_classes: int | None, image_size: int | None = None) -> tuple[LayerShape, ...]:
    """One entry per locally trained unit of the job's network, per sample, on images of the job's or another size.

    Raises ValueError when the architecture does not fit the images.
    """
    from hff.shapes import ARCHITECTURES, describe

    model = own_model(job)
    assert model is not None, "shapes of a backbone or of a user's own network are known to their code alone"
    options = ARCHITECTURES[model.arch]
    values = {f.name: getattr(model, f.name) for f in fields(options)}
    side = image_size or job.data.image_size
    return describe(
        options(**values),
        (job.data.channels, side, side),
        [head_shape(job, num_classes, layer) for layer in range(len(model.widths))],
        block_size=block_size(job),
        end_to_end=job.objective.name == "bp",
    )


def same_weights_at(job: Job, image_size: int) -> bool:
    """Whether the job's network, heads too, can take images of another size as it is."""
    try:
        own, other = (layer_shapes(job, None, size) for size in (job.data.image_size, image_size))
    except ValueError:
        return False
    return [(s.parameters, s.head_features) for s in own] == [(s.parameters, s.head_features) for s in other]


def block_size(job: Job) -> int:
    """Bodies that share one head and one loss."""
    return int(getattr(job.objective, "block_size", 1))


def locality(job: Job) -> str:
    """How far gradients reach: one layer and a linear or prototype head (S0), hidden convolutions in the head too (S1),
    a block of layers (B), or all of them (BP). A head of the user's own is taken for a linear one."""
    if job.objective.name == "bp":
        return "BP"
    if block_size(job) > 1:
        return "B"
    return "S1" if getattr(job.objective, "aux_convs", 0) else "S0"


def one_stage(job: Job) -> bool:
    """Whether every worker has all layers: nothing is passed between them."""
    return job.objective.name in ("bp", "ff")


def unit_words(job: Job) -> str:
    """What `units` counts, in words."""
    size = block_size(job)
    return "layers" if size == 1 else f"blocks of {size} layers"


def own_model(job: Job) -> OwnModel | None:
    """The model section when the network is an architecture of hff."""
    from orchestrator.job.models import OwnModel

    return job.model if isinstance(job.model, OwnModel) else None


def file_model(job: Job) -> FileModel | None:
    """The model section when the network is a class in a file of the user's."""
    from orchestrator.job.models import FileModel

    return job.model if isinstance(job.model, FileModel) else None


def backbone_model(job: Job) -> BackboneModel | None:
    """The model section when the network is a timm backbone with heads."""
    from orchestrator.job.models import BackboneModel

    return job.model if isinstance(job.model, BackboneModel) else None


def cached_features(job: Job) -> Features | None:
    """How the outputs of a frozen backbone are kept; None where they are computed anew in every epoch."""
    from orchestrator.job.schema import TransferJob

    if not isinstance(job, TransferJob) or job.model.freeze != "all" or not job.features.cache:
        return None
    return job.features


def units(job: Job) -> int | None:
    """The number of locally trained units: what a stage can own. None where only the network's code can tell."""
    if job.objective.name == "bp":
        return 1
    own, in_file, trunk = own_model(job), file_model(job), backbone_model(job)
    bodies = len(own.widths) if own is not None else getattr(in_file, "layers", None)
    if bodies is not None:
        return -(-int(bodies) // block_size(job))
    if trunk is None or trunk.heads_at == "all":
        return None
    return (1 if trunk.heads_at == "last" else len(set(trunk.heads_at))) + len(trunk.top_widths)
