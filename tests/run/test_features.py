"""Runs on cached features: the same heads as on images, and never the features of another recipe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.neighbors import KNeighborsClassifier

from hff.network import GreedyNetwork
from orchestrator.data.feature_store import is_whole
from orchestrator.data.features import FeatureSet
from orchestrator.data.index import open_index
from orchestrator.data.pack import pack
from orchestrator.errors import CheckpointError, DataError, Interrupted, JobError
from orchestrator.job.load import load_job
from orchestrator.job.resolved import job_to_dict
from orchestrator.job.schema import Job
from orchestrator.launch import crews, local
from orchestrator.launch.controls import CONTROLS, wanted_controls
from orchestrator.launch.crews import Here, Recruit, here
from orchestrator.launch.driver import run_job
from orchestrator.launch.features import Maker, features_command, features_of
from orchestrator.run import checkpoint, network
from orchestrator.run.context import LocalContext
from orchestrator.run.datasets import Datasets, Normalise, Part, Sources, open_datasets, prepare_embedded
from orchestrator.run.evaluate_run import evaluate_run
from orchestrator.run.features import Wanted, build_trunk, examine, recipe, wanted_sets
from orchestrator.run.folder import RunFolder
from orchestrator.run.planning import resolved
from orchestrator.run.worker import Assignment
from orchestrator.transfer.cached import fed, trunk_parts
from orchestrator.transfer.weights import trunk_state_dict

TEXT = """\
kind: transfer
name: {name}
runs: {runs}
data: {{train: digits, val: {{from_train: 0.25}}, image_size: 32}}
model: {{backbone: test_resnet.r160_in1k, pretrained: false, heads_at: [0, 2], top_widths: [16], vote: equal}}
objective: {{name: hff}}
train: {{epochs: 2, global_batch_size: 100, optimizer: adamw, lr: 5.0e-3}}
features: {{dtype: float32}}
cluster: {{launcher: process, workers: 1, timeout_s: 60, max_failures: 0}}
tracking: {{uri: "sqlite:///{database}"}}
"""

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
Make = Callable[..., Job]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def job(home: Path, shared_database: Path) -> Make:
    """The small transfer job under a name, with overrides; all share one runs folder, so one cache."""

    def make(name: str = "sample", *overrides: str, runs: Path = home / "runs") -> Job:
        path = home / f"{name}.yaml"
        path.write_text(TEXT.format(name=name, runs=runs, database=shared_database))
        return resolved(load_job(path, overrides))

    return make


def quietly(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """MLflow and its database layer warn of their own affairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def train(job: Job, **options: Any) -> dict[str, Any]:
    summary: dict[str, Any] = quietly(run_job, job, say=lambda _: None, **options)
    return summary


def opened(job: Job) -> Datasets:
    values = job_to_dict(job)
    prepare_embedded(values["data"], Path(job.runs))
    return open_datasets(values)


def prepared(job: Job, event: Callable[[dict[str, Any]], None] = lambda _: None) -> list[Wanted]:
    """Make the features of a job; gives its sets."""
    datasets = opened(job)
    features_of(job, datasets, None, say=lambda _: None, event=event)
    values = job_to_dict(job)
    return wanted_sets(values, datasets, examine(values, len(datasets.classes), None))[0]


def layers_of(job: Job, run: Path) -> list[Any]:
    values = job_to_dict(job)
    size = values["data"]["image_size"]
    layers = network.build(values["model"], values["objective"], input_shape=(3, size, size), num_classes=10, seed=0)
    newest, _ = checkpoint.newest_valid(RunFolder(run))
    assert newest is not None
    for number, layer in enumerate(layers):
        checkpoint.load_layer(newest, number, layer)
    return layers


class Leaving(LocalContext):
    """A worker that is asked to leave after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def stop_requested(self) -> bool:
        self.steps -= 1
        return self.steps < 0


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


@pytest.mark.slow
def test_two_processes_compute_the_features_of_one(job: Make, tmp_path: Path) -> None:
    ours = prepared(job("sample", "cluster.workers=2", runs=tmp_path))[0].plan.folder
    theirs = prepared(job())[0].plan.folder
    assert Path(ours).name == Path(theirs).name
    assert FeatureSet(ours).index.sha256 == FeatureSet(theirs).index.sha256


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


def layers_of_trunk(values: dict[str, Any]) -> list[Any]:
    return build_trunk(values, 10, torch.device("cpu"))


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


# --- making them


def ready(job: Job) -> tuple[Recruit, Wanted]:
    values, datasets = job_to_dict(job), opened(job)
    trunk = examine(values, 10, None)
    return Recruit(values, 10, trunk, None), wanted_sets(values, datasets, trunk)[0][0]


class Signalled(Here):
    """A crew whose driver gets SIGTERM while the second shard is being computed."""

    def submit(self, wanted: Wanted, number: int, tick: Callable[[], None]) -> Any:
        def tick_and_signal() -> None:
            tick()
            os.kill(os.getpid(), signal.SIGTERM)

        return super().submit(wanted, number, tick_and_signal if number == 1 else tick)


def test_a_stopped_extraction_keeps_its_finished_shards_and_goes_on(job: Make, tmp_path: Path) -> None:
    recruit, wanted = ready(job("sample", runs=tmp_path))
    said: list[str] = []
    with pytest.raises(Interrupted) as caught:
        Maker(lambda: nullcontext(Signalled(recruit)), said.append, lambda _: None).make([wanted])
    assert caught.value.exit_code == 75
    assert said == ["SIGTERM: leaving after the batch that is being computed (again: leave at once)"]
    assert not Path(wanted.plan.folder).exists()
    assert (wanted.plan.partial / "features-000000.tar").exists()
    assert not (wanted.plan.partial / "features-000001.tar").exists()
    told: list[dict[str, Any]] = []
    Maker(lambda: here(recruit), said.append, told.append).make([wanted])
    size = wanted.plan.ranges[0][1]
    assert f"Features of train: {size} of 1797 images are there already" in said
    assert [e["made"] for e in told] == [1797 - size]
    reference = FeatureSet(prepared(job())[0].plan.folder)
    rows = np.arange(1797)
    assert np.array_equal(FeatureSet(wanted.plan.folder).gather(rows), reference.gather(rows))


def test_two_writers_at_once_make_one_set(job: Make, tmp_path: Path) -> None:
    recruit, wanted = ready(job("sample", runs=tmp_path))
    told: list[dict[str, Any]] = []
    both = [Here(recruit), Here(recruit)]
    start = threading.Barrier(2)

    def write(crew: Here) -> None:
        start.wait(10)
        # Signals belong to the main thread: below what sets them up.
        Maker(lambda: nullcontext(crew), lambda _: None, told.append)._make(wanted, crew)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, both))
    assert sorted(e["made"] for e in told) == [0, 1797]
    assert is_whole(wanted.plan)
    assert [p.name for p in (tmp_path / ".features").iterdir()] == [Path(wanted.plan.folder).name]


def test_a_cut_shard_is_made_again_and_not_used(job: Make, tmp_path: Path) -> None:
    small = job("sample", runs=tmp_path)
    wanted = prepared(small)[0]
    whole = FeatureSet(wanted.plan.folder).gather(np.arange(1797))
    shard = Path(wanted.plan.folder) / "features-000001.tar"
    shard.write_bytes(shard.read_bytes()[:10_000])
    told: list[dict[str, Any]] = []
    prepared(small, told.append)
    assert [e["made"] for e in told] == [1797]
    assert np.array_equal(FeatureSet(wanted.plan.folder).gather(np.arange(1797)), whole)


def test_a_worker_that_fails_stops_the_others_and_its_error_is_the_one_that_is_seen(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, here in threads; the fourth shard has a damaged image."""
    recruit, wanted = ready(job("sample", runs=tmp_path))
    index = open_index(wanted.source)
    shard = index.folder / index.shards[0].name
    content = bytearray(shard.read_bytes())
    content[int(index.members["offset"][1000]) + 20] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr(crews, "_own", [recruit.extractor(torch.device("cpu"))])
    with ThreadPoolExecutor(2) as pool, pytest.raises(DataError) as caught:
        Maker(lambda: nullcontext(crews.Processes(pool, 2)), lambda _: None, lambda _: None).make([wanted])
    assert "key 000001000: member .png: expected CRC32" in str(caught.value)
    kept = sorted(p.name for p in wanted.plan.partial.glob("*.tar"))
    assert 0 < len(kept) < len(wanted.plan.ranges)
    assert not list((tmp_path / ".features").glob(".*.lock"))


@pytest.mark.parametrize("cache", ["true", "false"])
def test_an_image_that_cannot_be_decoded_is_a_counted_skip_over_an_interruption_too(
    job: Make, tmp_path: Path, cache: str
) -> None:
    for i in range(40):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    index = pack(tmp_path / "images", tmp_path / "packed")
    settings = (f"data.train={index.folder}", "data.val=null", "train.global_batch_size=4", "train.epochs=1")

    def sample(name: str) -> Job:
        return job(name, *settings, f"features.cache={cache}", runs=tmp_path / "runs")

    whole = train(sample("whole"))
    assert whole["skipped_samples"] == 1
    assert whole["samples_seen"] == 39
    with pytest.raises(Interrupted):
        train(sample("cut"), launch=lambda assignment: local.run_here(assignment, Leaving(8)))
    newest, _ = checkpoint.newest_valid(RunFolder(tmp_path / "runs" / "cut"))
    assert newest is not None
    left_out = checkpoint.read_state(newest)["ledger"]["epoch_skipped"]
    assert len(left_out) == 1, "stopped before the bad image: the test proves nothing"
    resumed = train(sample("cut"))
    assert resumed["attempts"] == 2
    for key in ("order_sha256", "sample_keys_sha256", "skipped_samples", "samples_seen", "weights_sha256"):
        assert resumed[key] == whole[key], key


def test_numbers_too_large_for_float16_are_refused_with_the_remedy(job: Make, tmp_path: Path) -> None:
    settings = ("features.dtype=float16", "data.std=[1e-6, 1e-6, 1e-6]")
    with pytest.raises(JobError) as caught:
        prepared(job("sample", *settings, runs=tmp_path))
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("features.dtype: must be float32 for this backbone, got 'float16': its output")


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


def test_the_command_makes_what_a_job_needs_and_refuses_other_jobs(
    job: Make, home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job("command")
    path = str(home / "command.yaml")
    assert features_command(path, [f"runs={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "Features of train: 1797 images, " in out and "images/s); kept in " in out
    assert features_command(path, [f"runs={tmp_path}"]) == 0
    assert f"Features of train: 1797 images, in {tmp_path / '.features'}" in capsys.readouterr().out
    for override in ("model.freeze=none", "features.cache=false"):
        with pytest.raises(JobError, match=r"has no features to make: only a transfer job with model\.freeze all"):
            features_command(path, [override])
    shutil.rmtree(tmp_path)


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
