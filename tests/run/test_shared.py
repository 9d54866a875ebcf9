"""A worker that does not see the run's folder is told before the first step, by name, and so are all others."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import JobError
from orchestrator.run.context import Control
from orchestrator.run.folder import RunFolder
from orchestrator.run.shared import refuse_unshared
from tests.pipeline.ranks import run_ranks


def _told(rank: int, folders: list[Path]) -> str:
    try:
        refuse_unshared(RunFolder(folders[rank]), "token", rank, Control(len(folders), 60))
    except JobError as error:
        return str(error)
    return ""


def made(*folders: Path) -> list[Path]:
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / "job.yaml").touch()
    return list(folders)


def test_workers_that_share_the_folder_go_on_and_leave_nothing_behind(tmp_path: Path) -> None:
    (here,) = made(tmp_path / "run")
    assert run_ranks(2, _told, [here, here]) == ["", ""]
    assert [path.name for path in here.iterdir()] == ["job.yaml"]


def test_a_worker_with_a_folder_of_its_own_is_named_to_all(tmp_path: Path) -> None:
    here, elsewhere = made(tmp_path / "run", tmp_path / "other")
    said = run_ranks(3, _told, [here, elsewhere, here])
    assert said[0] == said[1] == said[2]
    assert said[0].startswith(f"runs: must be storage that all nodes share, got {tmp_path}, where worker 1 on ")


def test_a_first_worker_apart_from_the_driver_is_named(tmp_path: Path) -> None:
    """The driver has written the job where no worker is."""
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "worker 0 on " in run_ranks(1, _told, [empty])[0]
