"""docs/job-reference.md says what the schema says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.job.load import flatten, job_to_dict, load_any
from orchestrator.job.meanings import MEANINGS
from orchestrator.job.reference import Row, tables, text
from orchestrator.job.repair import KNOWN_PATHS
from tests.conftest import ROOT

MINIMAL = {
    "train": "kind: train\nname: x\ndata: {train: a, image_size: 8}\nmodel: {arch: vgg, widths: [8]}\n"
    "objective: {name: hff}\ntrain: {epochs: 1, global_batch_size: 10, lr: 1}\n",
    "transfer": "kind: transfer\nname: x\ndata: {train: a}\nmodel: {backbone: resnet18}\nobjective: {name: hff}\n"
    "train: {epochs: 1, global_batch_size: 10, lr: 1}\n",
}


def rows_of(kind: str) -> Iterator[Row]:
    for _, _, found in tables(kind):
        yield from found


def test_the_page_is_what_the_schema_gives() -> None:
    same = (ROOT / "docs/job-reference.md").read_text() == text()
    assert same, "run: .venv/bin/python -m orchestrator.job.reference > docs/job-reference.md"


@pytest.mark.parametrize("kind", sorted(KNOWN_PATHS))
def test_every_key_of_a_kind_is_there_with_a_meaning(kind: str) -> None:
    rows = {row.path.replace(".N.", ".").replace(".PATH.", "."): row for row in rows_of(kind)}
    sections = {
        ".".join(p) for p in KNOWN_PATHS[kind] if any(len(q) > len(p) and q[: len(p)] == p for q in KNOWN_PATHS[kind])
    }
    assert {".".join(path) for path in KNOWN_PATHS[kind]} - sections <= rows.keys()
    assert [path for path, row in rows.items() if not row.meaning] == [], "add them to orchestrator/job/meanings.py"


def test_every_meaning_is_of_a_key() -> None:
    paths = {row.path.replace(".N.", ".").replace(".PATH.", ".") for kind in KNOWN_PATHS for row in rows_of(kind)}
    assert MEANINGS.keys() - paths == set()


@pytest.mark.parametrize("kind", sorted(MINIMAL))
def test_the_defaults_are_those_that_a_job_without_the_keys_gets(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL[kind])
    job = flatten(job_to_dict(load_any(path)))
    told = {
        row.path: None if row.default == "none" else yaml.safe_load(row.default)
        for heading, _, rows in tables(kind)
        for row in rows
        if row.default != "required"
        and " in each channel" not in row.default
        and not heading.endswith((": ce", ": bp", ": mlp", ": own"))
    }
    compared = {key: value for key, value in told.items() if key in job and key not in ("runs", "train.epochs")}
    assert len(compared) > 40
    assert {key: job[key] for key in compared} == compared
