"""The data of a job against each other and against what the job states of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.index import open_index, write_index
from orchestrator.data.packing.pack import pack
from orchestrator.errors import DataError
from orchestrator.run.datasets import open_datasets
from tests.data.conftest import encoded, noise, write_tar


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    """Two packed sets, one of the classes a and b, one of the classes a and c; six images each."""
    folders = {}
    for labels in ("ab", "ac"):
        images = [(f"{label}/{i}.png", encoded(noise(i))) for label in labels for i in range(3)]
        folders[labels] = str(pack(write_tar(tmp_path / f"{labels}.tar", images), tmp_path / labels).folder)
    return folders


def job(data: dict[str, Any], runs: Path) -> dict[str, Any]:
    """The parts of a resolved job that decide which images serve what."""
    return {"data": data, "runs": str(runs), "model": {"vote": "last"}, "train": {"vote_from_train": 0.1}}


def data(**changes: Any) -> dict[str, Any]:
    return {"val": None, "test": None, "expect": None, **changes}


def test_what_the_job_states_of_its_data_is_held_against_the_index(sets: dict[str, str], tmp_path: Path) -> None:
    true = {"classes": 2, "train_samples": 6, "val_samples": 6}
    found = open_datasets(job(data(train=sets["ab"], val=sets["ab"], expect=true), tmp_path))
    assert found.classes == ["a", "b"]
    for key, stated, message in (
        ("classes", 3, "the job states 3, the index has 2"),
        ("train_samples", 7, "the job states 7, the index has 6"),
        ("val_samples", 5, "the job states 5, the index has 6"),
    ):
        with pytest.raises(DataError) as caught:
            open_datasets(job(data(train=sets["ab"], val=sets["ab"], expect={**true, key: stated}), tmp_path))
        assert caught.value.findings == ((f"data.expect.{key}", f"{message}; correct it, or delete data.expect"),)
        assert str(caught.value).startswith(f"data.expect.{key}: {message}; ")
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("key", ["val", "test"])
def test_data_of_other_classes_are_refused(sets: dict[str, str], tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError) as caught:
        open_datasets(job(data(train=sets["ab"], **{key: sets["ac"]}), tmp_path))
    expected = (
        "its classes differ from those of data.train (2 against 2): 1 is missing (b), 1 is not in data.train (c); "
        f"leave those out and pack it again with --classes {sets['ab']}"
    )
    assert str(caught.value) == f"data.{key}: {expected}"


def test_the_same_classes_in_another_order_are_refused(sets: dict[str, str], tmp_path: Path) -> None:
    """Their numbers would be those of other classes."""
    index = open_index(sets["ab"])
    other = shutil.copytree(index.folder, tmp_path / "other")
    write_index(other, ["b", "a"], index.shards, np.array(index.members), "test")
    with pytest.raises(DataError, match=r"2 against 2\): the same in another order; pack it again with --classes"):
        open_datasets(job(data(train=sets["ab"], val=str(other)), tmp_path))


def test_a_folder_without_an_index_is_named_with_its_key(sets: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.val: .*nowhere: there is no such folder; "):
        open_datasets(job(data(train=sets["ab"], val=str(tmp_path / "nowhere")), tmp_path))
