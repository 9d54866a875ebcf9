"""A valid job as plain values: as a file, as a hash, and compared with another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from orchestrator.job import document
from orchestrator.job.schema import Job
from orchestrator.job.show import show

INTERPRETER_LINE = "#!/usr/bin/env -S python -m orchestrator run"

_FREE_SECTIONS = ("name", "runs", "cluster", "tracking", "checkpoint", "controls")
# Keys that came after the first version, at the value that means what it did: saved runs stay the same jobs.
_LATER: dict[tuple[str, ...], Any] = {
    ("per_layer",): [],
    ("train", "vote_from_train"): 0.1,
    ("train", "micro_batches"): 1,
    ("objective", "similarity"): 0.0,
    ("objective", "aux_convs"): 0,
    ("objective", "coarse"): [],
    ("train", "ema_decay"): 0.0,
    ("train", "compile"): False,
    ("train", "link_precision"): "same",
    ("data", "crop_share"): None,
    ("data", "repeat_batch"): False,
    ("data", "progressive"): None,
    ("data", "augment", "color_jitter"): {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
    ("data", "augment", "rand_augment"): None,
    ("data", "augment", "mixup"): 0.0,
    ("data", "augment", "cutmix"): 0.0,
}
_WITH_CODE = ("model", "objective")
_FREE_DATA = (
    "train",
    "test",
    "loader_threads",
    "loader_processes",
    "decoded_cache_mb",
    "prefetch_batches",
    "cache",
    "expect",
)


def job_to_dict(job: BaseModel) -> dict[str, Any]:
    """Every key of a job with its value, defaults too, in plain types (JSON can hold them)."""
    return job.model_dump(mode="json")


def job_yaml(job: BaseModel) -> str:
    """The text of a job file that `load_job` reads back as an equal job; empty keys are left out."""
    body: str = yaml.dump(
        _without_nothing(job_to_dict(job)),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=110,
    )
    return f"{INTERPRETER_LINE}\n{body}"


class _Dumper(yaml.SafeDumper):
    """Quotes every text that some YAML version would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _ambiguous(text) else None)


def _ambiguous(text: str) -> bool:
    try:
        return bool(document.scalar(text) != text)
    except document.NotFinite:
        return True


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nothing(v) for k, v in value.items() if v is not None}
    return value


def decisive(job: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a job that decides the result.

    Left out: the name, `runs`, `cluster`, `tracking`, `checkpoint`, where the data are, how they are loaded
    and what is expected of them (their identity is the hash of their index).
    """
    kept = {key: value for key, value in job.items() if key not in _FREE_SECTIONS}
    data = {key: value for key, value in dict(job["data"]).items() if key not in _FREE_DATA}
    if not isinstance(data.get("val"), dict):
        data.pop("val", None)
    # Code of the user's own is known by the hash of its file.
    own = {part: {key: value for key, value in dict(job[part]).items() if key != "file"} for part in _WITH_CODE}
    return _as_before(kept | {"data": data} | own)


def _as_before(values: dict[str, Any]) -> dict[str, Any]:
    for path, value in _LATER.items():
        *sections, key = path
        owner = values
        for name in sections:
            owner[name] = dict(owner.get(name) or {})
            owner = owner[name]
        if key in owner and owner[key] == value:
            del owner[key]
    return values


def job_sha256(job: Job) -> str:
    """The hash of what decides the result."""
    text = json.dumps(decisive(job_to_dict(job)), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What decides the result and differs, a line for each key: `train.lr: was 0.1, is 0.2`."""
    before, after = flatten(decisive(old)), flatten(decisive(new))
    return [
        f"{key}: was {show(before.get(key))}, is {show(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one with dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat
