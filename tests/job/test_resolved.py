"""Jobs as text, as a hash and compared: what is written is read back equal; only what decides counts."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.job.load import differences, flatten, job_sha256, job_to_dict, job_yaml, load_job
from orchestrator.job.schema import Job, TrainJob

WORDS = [
    "no",
    "1e-3",
    "010",
    "null",
    "1_0",
    "a b",
    "ünï",
    "x: y",
    "# z",
    "'",
    '"',
    "-",
    "0x1",
    ".inf",
    "~",
    "=",
]


def random_job(rng: random.Random, folder: Path) -> Job:
    """Any valid job, each optional key there or not."""

    def some(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if rng.random() < 0.5}

    channels = rng.choice([1, 3])
    depth = rng.randint(1, 4)
    model: dict[str, Any] = {
        "widths": [rng.randint(1, 64) for _ in range(depth)],
        **some({"vote": rng.choice(["last", "equal"]), "norm": rng.choice(["batch", "none"])}),
    }
    if rng.random() < 0.5:
        model |= {"arch": "mlp", **some({"dropout": rng.random() * 0.9})}
    else:
        model |= {
            "arch": "vgg",
            **some({"pool_after": [0], "head_grid": rng.randint(1, 2), "first_kernel": 5}),
        }
    name = rng.choice(["hff", "ce", "bp"])
    objective: dict[str, Any] = {"name": name, **some({"label_smoothing": rng.random() * 0.9})}
    if name != "bp":
        objective |= some({"similarity": rng.random(), "aux_convs": rng.randint(0, 2) * (model["arch"] == "vgg")})
    if name == "hff":
        objective |= some({"margin": rng.random(), "learn_scale": False, "scale": rng.uniform(16, 64)})
    replicas = rng.randint(1, 3)
    return TrainJob.model_validate(
        {
            "kind": "train",
            "name": rng.choice(["a", "1e3", "no", "0x10", "010", "null", "1.5", "true", "on-2"]),
            "runs": str(folder / rng.choice(WORDS)),
            "data": {
                "train": str(folder / rng.choice(WORDS)),
                "image_size": rng.randint(4, 256),
                "channels": channels,
                **some({"val": rng.choice([{"from_train": rng.uniform(0.01, 0.9)}, str(folder), None])}),
                **some({"test": str(folder / rng.choice(WORDS)), "shuffle_labels": True, "lanes": 7}),
                **some({"augment": some({"flip": True, "cutout": 3, "resized_crop": [rng.random() or 1.0, 1]})}),
                **some({"mean": [rng.uniform(-1e-9, 1e9) for _ in range(channels)]}),
                **some({"expect": {"train_samples": rng.randint(1, 10**9), "classes": rng.randint(2, 10**4)}}),
            },
            "model": model,
            "objective": objective,
            "train": {
                rng.choice(["epochs", "steps", "samples"]): rng.randint(1, 10**6),
                "global_batch_size": replicas * rng.randint(2, 99),
                "lr": 10 ** rng.uniform(-12, 12),
                **some(
                    {
                        "seed": rng.getrandbits(63),
                        "weight_decay": 5e-324,
                        "max_hours": 0.1,
                        "init_from": "r@3",
                    }
                ),
                **some({"betas": [rng.random() * 0.9, 0], "precision": "float64", "grad_clip": 1e300}),
            },
            "cluster": {"workers": replicas, "stages": 1, **some({"timeout_s": 1e-7, "use_gpu": True})},
            **some({"tracking": some({"experiment": rng.choice(WORDS), "uri": "http://h/#a: b"})}),
            **some({"checkpoint": some({"every_steps": 5})}),
        }
    )


def test_any_job_written_as_yaml_is_read_back_equal(tmp_path: Path) -> None:
    rng = random.Random(11)
    path = tmp_path / "job.yaml"
    for _ in range(150):
        job = random_job(rng, tmp_path)
        path.write_text(job_yaml(job), encoding="utf-8")
        again = load_job(path)
        assert again == job
        assert job_sha256(again) == job_sha256(job)
        assert job_yaml(again) == job_yaml(job)


def test_a_yaml_1_1_reader_sees_the_same_values(tmp_path: Path) -> None:
    """Other tools read job.yaml with PyYAML: no text may turn into a number there, or a number into text."""
    rng = random.Random(12)
    for _ in range(100):
        job = random_job(rng, tmp_path)
        said = flatten(yaml.safe_load(job_yaml(job)))
        assert said == {k: v for k, v in flatten(job_to_dict(job)).items() if v is not None}


def test_a_saved_job_begins_with_the_interpreter_line(load: Any) -> None:
    assert job_yaml(load()).splitlines()[0] == "#!/usr/bin/env -S python -m orchestrator run"


def test_a_job_as_values_holds_every_key_in_plain_types(load: Any) -> None:
    values = job_to_dict(load())
    assert json.loads(json.dumps(values)) == values
    assert values["train"]["steps"] is None
    assert values["objective"]["sharpness"] == 10.0
    assert values["model"]["widths"] == [8, 16, 32, 64]


FREE = [
    "name=other",
    "runs=/elsewhere",
    "cluster={workers: 4, stages: 2, launcher: process, use_gpu: true}",
    "tracking={uri: 'http://host', experiment: x, trace_steps: 3}",
    "checkpoint={every_steps: 7, keep_last: 9, background: false}",
    "data.train=/elsewhere/train",
    "data.val=/elsewhere/val",
    "data.test=/elsewhere/test",
    "data.loader_threads=3",
    "data.prefetch_batches=9",
    "data.expect={train_samples: 900, classes: 3}",
]


@pytest.mark.parametrize("override", FREE)
def test_what_does_not_decide_the_result_changes_neither_hash_nor_differences(load: Any, override: str) -> None:
    plain, changed = load(), load(override)
    assert changed != plain
    assert job_sha256(changed) == job_sha256(plain)
    assert differences(job_to_dict(plain), job_to_dict(changed)) == []


DECISIVE = [
    ("train.lr=2e-3", "train.lr: was 0.001, is 0.002"),
    ("train.seed=1", "train.seed: was 0, is 1"),
    ("train.precision=float64", "train.precision: was 'float32', is 'float64'"),
    ("train.grad_clip=1", "train.grad_clip: was nothing, is 1.0"),
    ("data.lanes=47", "data.lanes: was 48, is 47"),
    ("data.augment.flip=true", "data.augment.flip: was false, is true"),
    ("data.shuffle_labels=true", "data.shuffle_labels: was false, is true"),
    ("data.val={from_train: 0.1}", "data.val.from_train: was nothing, is 0.1"),
    ("data.mean=[0, 0, 0]", "data.mean: was [0.5, 0.5, 0.5], is [0.0, 0.0, 0.0]"),
    ("model.widths=[8, 16, 32, 65]", "model.widths: was [8, 16, 32, 64], is [8, 16, 32, 65]"),
    ("objective.margin=0.1", "objective.margin: was 0.0, is 0.1"),
]


@pytest.mark.parametrize(("override", "line"), DECISIVE, ids=[o for o, _ in DECISIVE])
def test_what_decides_the_result_changes_the_hash_and_is_named(load: Any, override: str, line: str) -> None:
    plain, changed = load(), load(override)
    assert job_sha256(changed) != job_sha256(plain)
    assert differences(job_to_dict(plain), job_to_dict(changed)) == [line]


def test_every_key_of_model_objective_and_train_is_decisive(load: Any) -> None:
    values = job_to_dict(load())
    for section in ("model", "objective", "train"):
        for key in values[section]:
            other = copy.deepcopy(values)
            other[section][key] = "something else"
            assert differences(values, other) != [], (section, key)


def test_differences_do_not_mind_how_a_saved_job_leaves_out_empty_keys(load: Any) -> None:
    job = load("data.augment.cutout=3")
    assert differences(yaml.safe_load(job_yaml(job)), job_to_dict(job)) == []


def test_the_hash_is_the_same_in_every_process_and_version(load: Any) -> None:
    """A fixed number: a change of it makes every saved run look like another job."""
    assert job_sha256(load()) == "9721329f074ac40c74f39a6baa2a30be53291dd30c62ff623b318d7d174cc3c6"


def test_flatten_joins_keys_with_dots_and_keeps_lists() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None, "g": {}}) == {
        "a.b.c": 1,
        "a.d": [1, {"e": 2}],
        "f": None,
    }
