"""Runs on cached features: the same heads as on images, and never the features of another recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from hff.network import GreedyNetwork
from orchestrator.errors import CheckpointError, Interrupted, JobError
from orchestrator.job.resolved import job_to_dict
from orchestrator.job.schema import Job
from orchestrator.launch.controls import CONTROLS, wanted_controls
from orchestrator.launch.driver import run_job
from orchestrator.launch.workers import local
from orchestrator.run import checkpoint, network
from orchestrator.run.context import LocalContext
from orchestrator.run.datasets import Datasets, Normalise, Part, Sources
from orchestrator.run.features import examine, recipe, wanted_sets
from orchestrator.run.folder import RunFolder
from orchestrator.run.inference.evaluate_run import evaluate_run
from orchestrator.run.worker import Assignment
from orchestrator.transfer.cached import fed, trunk_parts
from orchestrator.transfer.weights import trunk_state_dict
from tests.run.feature_jobs import Leaving, Make, layers_of_trunk, opened, prepared, quietly, train

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def layers_of(job: Job, run: Path) -> list[Any]:
    values = job_to_dict(job)
    size = values["data"]["image_size"]
    layers = network.build(values["model"], values["objective"], input_shape=(3, size, size), num_classes=10, seed=0)
    newest, _ = checkpoint.newest_valid(RunFolder(run))
    assert newest is not None
    for number, layer in enumerate(layers):
        checkpoint.load_layer(newest, number, layer)
    return layers


@pytest.fixture(scope="module")
def pair(job: Make) -> dict[str, Any]:
    """The same job trained on cached features and on images."""
    cached, streamed = job("cached"), job("streamed", "features.cache=false")
    return {
        "cached": cached,
        "streamed": streamed,
        "runs": Path(cached.runs),
        "from_features": train(cached),
        "from_images": train(streamed),
    }


def test_heads_learn_from_features_what_they_learn_from_images(pair: dict[str, Any]) -> None:
    a, b = pair["from_features"], pair["from_images"]
    assert a["order_sha256"] == b["order_sha256"]
    assert a["sample_keys_sha256"] == b["sample_keys_sha256"]
    assert a["steps"] == b["steps"] == 28
    assert max(layer["val_top1"] for layer in a["layers"]) > 0.3
    assert a["val_top1"] == pytest.approx(b["val_top1"], abs=0.01)
    ours_theirs = [layers_of(pair[kind], pair["runs"] / kind) for kind in ("cached", "streamed")]
    for ours, theirs in zip(*ours_theirs, strict=True):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, tensor in ours.state_dict().items():
            expected = theirs.state_dict()[name]
            # Convolutions round otherwise in batches of another size, and AdamW makes steps of equal length of it.
            apart = (tensor - expected).float().norm() / expected.float().norm().clamp(min=1e-9)
            assert apart < 1e-2, f"{ours.name} {name}: {apart}"


def test_a_run_on_features_classifies_images_as_it_classified_features(pair: dict[str, Any]) -> None:
    job, run = pair["cached"], pair["runs"] / "cached"
    of_images = evaluate_run(run, None)
    assert of_images["top1"] == pair["from_features"]["val_top1"]
    assert of_images["layer_top1"] == [layer["val_top1"] for layer in pair["from_features"]["layers"]]
    values, datasets = job_to_dict(job), opened(job)
    assert datasets.val is not None
    _, folders = wanted_sets(values, datasets, examine(values, 10, None))
    rows = datasets.val.subset[:100]
    images = Sources(values).evaluation(datasets.val).batch(rows).images
    features = Sources(values, folders).evaluation(datasets.val).batch(rows).images
    layers = layers_of(job, run)
    whole = GreedyNetwork(layers).eval()
    on_features = GreedyNetwork(fed(layers, 0, folders.parts)).eval()
    normalise = Normalise(values["data"], torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pairs = zip(whole.layer_logits(normalise(images)), on_features.layer_logits(features), strict=True)
        for ours, theirs in pairs:
            assert (ours - theirs).abs().max() < 1e-4


def test_the_run_tells_of_its_features_and_finds_them_the_next_time(pair: dict[str, Any], job: Make) -> None:
    events, _ = RunFolder(pair["runs"] / "cached").read_events()
    (made,) = [e for e in events if e["event"] == "features"]
    assert (made["set"], made["images"], made["made"]) == ("train", 1797, 1797)
    assert made["images_per_second"] == pytest.approx(1797 / made["seconds"])
    assert [p.name for p in (pair["runs"] / ".features").iterdir()] == [Path(made["folder"]).name]
    lines: list[str] = []
    again = job("again", "train.lr=1e-3", "objective.scale=20", "objective.prototypes_per_class=3")
    quietly(run_job, again, say=lines.append)
    assert f"Features of train: 1797 images, in {made['folder']}" in lines
    events, _ = RunFolder(pair["runs"] / "again").read_events()
    assert [e["made"] for e in events if e["event"] == "features"] == [0]


def test_two_stages_in_two_processes_learn_the_same_bits_from_features_as_one(pair: dict[str, Any], job: Make) -> None:
    piped = train(job("piped", "cluster.workers=2", "cluster.stages=2"))
    assert piped["stages"] == 2
    for key in ("weights_sha256", "order_sha256", "val_top1"):
        assert piped[key] == pair["from_features"][key], key


def test_a_run_stopped_in_mid_epoch_goes_on_to_the_same_weights(pair: dict[str, Any], job: Make) -> None:
    with pytest.raises(Interrupted):
        train(job("stopped"), launch=lambda assignment: local.run_here(assignment, Leaving(9)))
    resumed = train(job("stopped"))
    assert resumed["attempt_steps"] == [[0, 10], [10, 28]]
    for key in ("weights_sha256", "order_sha256", "sample_keys_sha256", "val_top1", "samples_seen"):
        assert resumed[key] == pair["from_features"][key], key


def test_votes_are_fitted_on_features_as_on_images(job: Make) -> None:
    fitted = ("model.vote=fitted", "train.epochs=1")
    ours, theirs = (train(job(f"votes-{c}", *fitted, f"features.cache={c}")) for c in ("true", "false"))
    assert ours["samples_per_epoch"] == theirs["samples_per_epoch"] < 1347
    assert ours["order_sha256"] == theirs["order_sha256"]
    assert ours["vote_weights"] == pytest.approx(theirs["vote_weights"], abs=0.05)


def test_every_epoch_trains_on_the_view_of_its_number(job: Make) -> None:
    """Four epochs on two views, against features computed anew from images augmented as in epochs 0 and 1."""
    views = job("views", "data.augment.crop_padding=4", "features.views=2", "train.epochs=4")
    sets = prepared(views)
    assert [s.name for s in sets] == ["train, view 1 of 2", "train, view 2 of 2", "train, not augmented"]
    assert len({s.plan.folder for s in sets}) == 3
    values, datasets = job_to_dict(views), opened(views)
    _, folders = wanted_sets(values, datasets, examine(values, 10, None))
    rows = datasets.train.subset[:64]
    units = layers_of_trunk(values)
    normalise = Normalise(values["data"], torch.device("cpu"), torch.float32)
    source = Sources(values, folders).training(datasets.train, None)
    images = Sources(values).training(datasets.train, None)
    for epoch in range(4):
        expected = torch.cat(trunk_parts(units, normalise(images.batch(rows, epoch % 2).images)), dim=1)
        assert torch.allclose(source.batch(rows, epoch).images, expected, atol=1e-4)
    apart = source.batch(rows, 0).images - source.batch(rows, 1).images
    assert apart.abs().max() > 1e-2, "the views differ"
    assert train(views)["steps"] == 56


AUGMENTED = ("data.augment.flip=true", "features.views=2")
CHANGES = {
    "another backbone": ("model.backbone=test_resnet2.r160_in1k",),
    "random weights of another seed": ("train.seed=1",),
    "heads at other stages": ("model.heads_at=[1, 2]",),
    "a coarser grid": ("model.head_grid=1",),
    "a larger image": ("data.image_size=40",),
    "another mean": ("data.mean=[0.4, 0.5, 0.5]",),
    "another spread": ("data.std=[0.25, 0.25, 0.3]",),
    "another crop": ("data.crop_share=0.5",),
    "another interpolation": ("data.interpolation=nearest",),
    "another dtype": ("features.dtype=float16",),
    "another precision": ("train.precision=bfloat16",),
    "augmentation": AUGMENTED,
}


def folders_of(job: Job, datasets: Datasets | None = None) -> set[str]:
    values, datasets = job_to_dict(job), datasets or opened(job)
    return {s.plan.folder for s in wanted_sets(values, datasets, examine(values, 10, None))[0]}


@pytest.mark.parametrize("change", [c for c in CHANGES if "backbone" not in c and c != "augmentation"])
def test_a_changed_recipe_never_finds_the_old_features(job: Make, change: str) -> None:
    assert not folders_of(job()) & folders_of(job("sample", *CHANGES[change])), change


@pytest.mark.parametrize("change", ["cutout=2", "crop_padding=2", "resized_crop=[0.5, 1.0]"])
def test_other_augmentation_or_another_seed_of_it_has_other_views(job: Make, change: str) -> None:
    before, plain = folders_of(job("sample", *AUGMENTED)), folders_of(job())
    assert before & plain == plain, "what evaluation sees is the same"
    after = folders_of(job("sample", *AUGMENTED, f"data.augment.{change}"))
    assert before & after == plain
    more = folders_of(job("sample", *AUGMENTED, "features.views=3"))
    assert more > before, "more views keep those that are there"


def test_the_seed_of_augmentation_is_part_of_a_view_and_of_nothing_else(job: Make, tmp_path: Path) -> None:
    """With weights from a file the seed decides the augmentation alone."""
    file = tmp_path / "w.safetensors"
    save_file(trunk_state_dict(layers_of_trunk(job_to_dict(job("sample", "model.heads_at=[0, 3]")))), file)
    fixed = (f"model.pretrained={file}", *AUGMENTED)
    one, two = folders_of(job("sample", *fixed)), folders_of(job("sample", *fixed, "train.seed=1"))
    assert len(one & two) == 1
    assert len(one) == len(two) == 3


def test_one_changed_bit_of_the_weights_file_is_another_trunk(job: Make, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    tensors = trunk_state_dict(layers_of_trunk(job_to_dict(job("sample", "model.heads_at=[0, 3]"))))
    save_file(tensors, file)
    fixed = f"model.pretrained={file}"
    before = folders_of(job("sample", fixed))
    assert before == folders_of(job("sample", fixed))
    name = next(k for k, t in tensors.items() if t.dtype == torch.float32 and t.dim() == 4)
    tensors[name].view(torch.int32).view(-1)[7] ^= 1
    save_file(tensors, file)
    assert load_file(file)[name].view(torch.int32).view(-1)[7] == tensors[name].view(torch.int32).view(-1)[7]
    assert not before & folders_of(job("sample", fixed))


def test_other_images_have_other_features(job: Make) -> None:
    datasets = opened(job())
    index = replace(datasets.train.index, sha256="0" * 64)
    others = Datasets(Part(index, datasets.train.subset), Part(index, np.arange(5)), None)
    assert not folders_of(job()) & folders_of(job(), others)


def test_the_recipe_names_everything_in_plain_values(job: Make) -> None:
    values = job_to_dict(job("sample", *AUGMENTED))
    content = recipe(values, examine(values, 10, None), "f" * 64, 3)
    assert json.loads(json.dumps(content)) == content
    assert content["backbone"] == "test_resnet.r160_in1k"
    assert set(content["transform"]) == {"image_size", "channels", "mean", "std", "crop_share", "interpolation"}
    assert content["augmented"]["epoch"] == 3


def test_weights_that_changed_under_a_run_are_refused(job: Make, pair: dict[str, Any]) -> None:
    """A worker never trains heads on features of one trunk above the frozen weights of another."""
    assignment: list[Assignment] = []
    train(job("watched"), launch=lambda a: (assignment.append(a), local.run_here(a, LocalContext()))[1])
    features = assignment[0].features
    assert features is not None
    other = replace(features, trunk=("0" * 64, *features.trunk[1:]))
    with pytest.raises(
        local.WorkerFailure, match=r"the frozen weights of test_resnet\.r160_in1k are not those"
    ) as caught:
        local.run_here(replace(assignment[0], features=other), LocalContext())
    assert isinstance(caught.value.__cause__, CheckpointError)


def test_under_torchrun_features_are_made_beforehand(job: Make, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="make them first with `orchestrator data features JOB`"):
        train(job("sample", runs=tmp_path), launch=lambda _: None)


def test_nearest_neighbours_are_a_control_without_training_that_agrees_with_scikit_learn(
    job: Make,
) -> None:
    """Against features averaged over the last map, of images sent through the backbone anew."""
    controlled = job("controlled", "controls=[knn]", "data.augment.flip=true", "features.views=2")
    assert wanted_controls(controlled) == ("knn",)
    result = CONTROLS["knn"](controlled, lambda _: pytest.fail("it trains nothing"))
    plain = job_to_dict(job("plain", "model.heads_at=[3]", "model.top_widths=[]", "model.head_grid=1"))
    datasets = opened(job())
    assert datasets.val is not None
    normalise = Normalise(plain["data"], torch.device("cpu"), torch.float32)
    units = layers_of_trunk(plain)

    def computed(part: Part) -> tuple[np.ndarray, np.ndarray]:
        batch = Sources(plain).evaluation(part).batch(part.subset)
        return trunk_parts(units, normalise(batch.images))[0].numpy(), batch.labels.numpy()

    known, classes = computed(datasets.train)
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(known, classes)
    queries, labels = computed(datasets.val)
    assert result["val_top1"] == pytest.approx(theirs.score(queries, labels), abs=0.005)
    assert result["val_top1"] > 0.5
    assert result["test_top1"] is None


def test_a_later_epoch_is_several_times_faster_than_the_pass_through_the_backbone(job: Make, tmp_path: Path) -> None:
    large = job("fast", "data.image_size=96", "model.top_widths=[]", "train.epochs=3", runs=tmp_path)
    told: list[dict[str, Any]] = []
    prepared(large, told.append)
    summary = train(large)
    assert summary["images_per_second"] > 3 * told[0]["images_per_second"]
