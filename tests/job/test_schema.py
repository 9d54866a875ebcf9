"""Jobs as objects: frozen, valid by construction, in step with the architectures of hff."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from hff.shapes import ARCHITECTURES
from orchestrator.job.models import MlpModel, ResnetModel, VggModel
from orchestrator.job.schema import TrainJob

MODELS = {"mlp": MlpModel, "vgg": VggModel, "resnet": ResnetModel}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_model_has_the_options_and_defaults_of_its_architecture(arch: str) -> None:
    options = {f.name: f.default for f in fields(ARCHITECTURES[arch])}
    words = {k: f for k, f in MODELS[arch].model_fields.items() if k not in ("arch", "vote")}
    assert options.keys() == words.keys()
    for name, default in options.items():
        assert words[name].is_required() if default is MISSING else words[name].default == default


def test_every_architecture_can_be_named_in_a_job() -> None:
    members = get_args(TrainJob.model_fields["model"].annotation)
    assert {get_args(m.model_fields["arch"].annotation)[0] for m in members} == {*ARCHITECTURES, "own"}


def test_the_defaults_are_those_that_are_documented(load: Any) -> None:
    job = load()
    assert (job.data.lanes, job.data.shuffle_window, job.data.loader_threads) == (48, 8192, 1)
    assert (job.data.mean, job.data.std, job.data.channels) == ((0.5,) * 3, (0.25,) * 3, 3)
    assert (job.data.val, job.data.test, job.data.expect, job.data.bad_sample_budget) == (
        None,
        None,
        None,
        1e-4,
    )
    assert (job.objective.scale, job.objective.scale_min, job.objective.scale_max) == (32, 16, 64)
    assert (job.train.optimizer, job.train.lr_schedule, job.train.schedule) == (
        "adamw",
        "one-cycle",
        "simultaneous",
    )
    assert (job.train.precision, job.train.seed, job.train.betas) == ("float32", 0, (0.9, 0.999))
    assert (job.cluster.launcher, job.cluster.workers, job.cluster.stages) == ("ray", 1, "auto")
    assert (job.cluster.threads_per_worker, job.cluster.timeout_s, job.cluster.max_failures) == (1, 300, 3)
    assert (job.checkpoint.every_steps, job.checkpoint.every_epochs, job.checkpoint.keep_last) == (None, 1, 2)
    assert (job.tracking.uri, job.tracking.experiment, job.tracking.trace_steps) == (None, "orchestrator", 0)


def test_digits_is_short_for_the_embedded_data_set(load: Any, text: str) -> None:
    short = text.replace("{train: data/shards, image_size: 32}", "digits")
    long = text.replace(
        "{train: data/shards, image_size: 32}",
        "{train: digits, val: {from_train: 0.25}, image_size: 8, channels: 1, mean: [0.5], std: [0.25]}",
    )
    assert load(content=short) == load(content=long)
    assert load("data=digits") == load(content=long)
    assert load("data.lanes=3", content=short).data.lanes == 3


@pytest.mark.parametrize("section", ["", "data", "data.augment", "model", "objective", "train", "cluster"])
def test_a_job_never_changes(load: Any, section: str) -> None:
    part = load()
    for key in section.split(".") if section else []:
        part = getattr(part, key)
    name = next(iter(type(part).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, name, getattr(part, name))


def test_lists_are_tuples_in_a_job(load: Any) -> None:
    job = load("data.augment.resized_crop=[0.5, 1]", "model.vote=[1, 0, 2, 3]")
    assert job.model.widths == (8, 16, 32, 64)
    assert job.data.augment.resized_crop == (0.5, 1.0)
    assert job.model.vote == (1.0, 0.0, 2.0, 3.0)
    hash(job.model.widths + job.model.vote + job.data.augment.resized_crop + job.train.betas)


def test_an_invalid_job_cannot_exist_as_an_object_either(load: Any) -> None:
    values = load().model_dump(mode="json")
    assert TrainJob.model_validate(values) == load()
    values["cluster"] |= {"workers": 1, "stages": 2}
    with pytest.raises(ValidationError, match=r"must be at least cluster\.stages"):
        TrainJob.model_validate(values)


def test_whole_numbers_are_taken_where_numbers_are_asked(load: Any) -> None:
    job = load("train.lr=1", "cluster.cpus_per_worker=2")
    assert (job.train.lr, job.cluster.cpus_per_worker) == (1.0, 2.0)
    assert type(job.train.lr) is float
