"""`runs prune` gives back the room of old checkpoints and never touches the newest whole one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.run import checkpoint
from orchestrator.run.folder import Lease, RunFolder
from orchestrator.show.listings.prune import prune
from tests.show.listings.test_runs import made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints at four steps; the newest and the second one are damaged."""
    path = made(tmp_path, "mine")
    for step in (10, 20, 30, 40):
        checkpoint.commit(RunFolder(path), step, 1, {"step": step}, [])
    for step in (20, 40):
        (checkpoint.step_folder(RunFolder(path), step) / "state.json").write_text("{}")
    return path


def steps(run: Path) -> list[int]:
    return checkpoint.steps_found(RunFolder(run))


@pytest.mark.parametrize(("keep", "left"), [(1, [30, 40]), (2, [10, 20, 30, 40]), (9, [10, 20, 30, 40])])
def test_the_newest_whole_checkpoints_stay_and_what_is_newer_too(run: Path, keep: int, left: list[int]) -> None:
    assert main(["runs", "prune", str(run), "--keep", str(keep), "--yes"]) == 0
    assert steps(run) == left
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step_{step:09d}" for step in left}


def test_where_none_is_whole_nothing_is_deleted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 30):
        (checkpoint.step_folder(RunFolder(run), step) / "manifest.json").unlink()
    assert main(["runs", "prune", str(run), "--yes"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "There is nothing to delete."
    assert steps(run) == [10, 20, 30, 40]


def test_a_dry_run_shows_what_would_go_as_a_table_and_as_json(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = made(tmp_path, "empty")
    assert main(["runs", "prune", str(run), str(empty), "--dry-run"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    table = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert table[0] == ["run", "status", "kept", "to delete", "frees"]
    assert table[1][:4] == [str(run), "before its first step", "30, 40", "10, 20"]
    assert table[2][1:] == ["before its first step", "-", "-", "0 B"]
    assert table[3] == ["Nothing was deleted (--dry-run)."]
    assert main(["runs", "prune", str(run), "--dry-run", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    size = sum(path.stat().st_size for step in (10, 20) for path in (run / "checkpoints").glob(f"*{step}/*"))
    assert row == {
        "run": str(run), "status": "before its first step", "kept": [30, 40], "deleted": [10, 20], "bytes": size,
    }  # fmt: skip
    assert steps(run) == [10, 20, 30, 40]


@pytest.mark.parametrize(("answer", "left"), [("y", [30, 40]), ("", [10, 20, 30, 40]), ("n", [10, 20, 30, 40])])
def test_it_asks_first_and_does_what_the_answer_says(
    run: Path, answer: str, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    questions: list[str] = []
    answered: Callable[[str], str] = lambda question: questions.append(question) or answer  # noqa: E731
    assert prune([run], keep=1, dry_run=False, confirmed=False, ask=answered) == 0
    assert questions == ["Delete 2 checkpoints for good? [y/N] "]
    assert steps(run) == left


def test_what_cannot_be_done_is_refused_with_its_exit_code_and_deletes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["runs", "prune", str(run)]) == 2
    assert capsys.readouterr().err == (
        "runs prune: nobody is here to be asked; give --yes to delete without a question\n"
    )
    assert main(["runs", "prune", str(run), "--keep", "0", "--yes"]) == 2
    assert capsys.readouterr().err == "--keep: must be a whole number >= 1, got '0'\n"
    assert main(["runs", "prune", str(run), str(tmp_path), "--yes"]) == 4
    assert "not a run folder" in capsys.readouterr().err
    with Lease(RunFolder(run)):
        assert main(["runs", "prune", str(run), "--yes"]) == 1
    assert "mine: this run is already being driven by process" in capsys.readouterr().err
    assert steps(run) == [10, 20, 30, 40]


def test_half_a_deletion_is_no_checkpoint_and_goes_with_the_next_attempt(run: Path) -> None:
    folder = RunFolder(run)
    where = checkpoint.step_folder(folder, 10)
    where.rename(where.with_name(f".{where.name}.pruned.tmp"))
    assert steps(run) == [20, 30, 40]
    checkpoint.remove_leftovers(folder)
    assert sorted(path.name for path in folder.checkpoints.iterdir())[0] == "step_000000020"
