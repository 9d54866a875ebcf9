"""`runs compare` shows what differs and nothing else; `runs rm` deletes what it was told to and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.run.folder import Lease, RunFolder
from orchestrator.show.listings import runs
from orchestrator.show.listings.compare import differing_keys

JOB = """\
kind: train
name: {name}
data: digits
model: {{arch: mlp, widths: {widths}}}
objective: {{name: {objective}}}
train: {{epochs: 2, global_batch_size: 50, lr: {lr}}}
"""


def made(folder: Path, name: str, *, lr: str = "1e-3", widths: str = "[8, 4]", objective: str = "hff") -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "job.yaml").write_text(JOB.format(name=name, lr=lr, widths=widths, objective=objective))
    return run


def finish(run: Path, top1: float, layers: list[float]) -> None:
    summary = {
        "status": "finished", "val_top1": top1, "val_top5": None, "images_per_second": 1234.4, "wall_seconds": 75.0,
        "peak_memory_bytes": [1_000_000, 2_000_000], "weights_sha256": "ab" * 32,
        "layers": [{"index": i, "val_top1": x} for i, x in enumerate(layers)],
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))


def test_results_and_differing_keys_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = made(tmp_path, "one")
    two = made(tmp_path, "two", lr="2e-3", widths="[8, 4, 4]", objective="ce")
    finish(one, 0.91, [0.8, 0.91])
    finish(two, 0.92, [0.7, 0.9, 0.92])
    assert main(["runs", "compare", str(one), str(two)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split("  ")[0]: line.split()[-4:] for line in lines}
    assert lines[0].split() == ["result", "one", "two"]
    assert found["val top-1"][-4:] == ["91.00", "%", "92.00", "%"]
    assert found["layer 2 val top-1"][-3:] == ["-", "92.00", "%"]
    assert found["images/s"][-2:] == ["1234", "1234"]
    assert found["training time"][-2:] == ["1:15", "1:15"]
    assert found["peak memory"] == ["2", "MB", "2", "MB"]
    assert found["weights"][-1] == "abababababab"
    assert "val top-5" not in found, "a result that no run has is left out"
    keys = [line.split()[0] for line in lines[lines.index("") + 2 :]]
    assert keys[:4] == ["model.widths", "objective.name", "objective.prototypes_per_class", "objective.margin"]
    assert keys[-1] == "train.lr"
    assert found["train.lr"][-2:] == ["0.001", "0.002"]
    assert found["objective.margin"][-2:] == ["0.0", "-"]


def test_a_comparison_as_json_has_the_summaries_and_the_differing_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = made(tmp_path, "one"), made(tmp_path, "two", lr="2e-3", objective="ce")
    finish(one, 0.91, [0.8, 0.91])
    assert main(["runs", "compare", str(one), str(two), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == [
        {"run": "one", "status": "finished", "summary": json.loads((one / "summary.json").read_text())},
        {"run": "two", "status": "before its first step", "summary": {"attempts": None}},
    ]
    assert found["differing"]["train.lr"] == [0.001, 0.002]
    assert found["differing"]["objective.margin"] == [0.0, None]
    assert "name" not in found["differing"]


def test_runs_of_one_job_are_said_to_differ_in_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = made(tmp_path / "a", "same"), made(tmp_path / "b", "same")
    (two / "progress.json").write_text('{"step": 3, "steps_total": 54}')
    assert main(["runs", "compare", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nThe jobs differ in nothing but their names.\n")
    assert "step 3/54" in out
    assert out.splitlines()[0].split() == ["result", "a/same", "b/same"]


def test_keys_differ_when_a_value_or_their_presence_does() -> None:
    jobs = [{"a": 1, "b": [1], "c": None}, {"a": 1, "b": [2], "d": 0}, {"a": 1, "b": [1], "c": None}]
    assert differing_keys(jobs) == ["b", "c", "d"]
    assert differing_keys(jobs[::2]) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "{run}"], "runs compare: needs two runs or more, got 1\n"),
        (["rm", "{link}"], "{link}: is a link, not a run folder; give the folder that it leads to, {run}\n"),
        (["rm", "{run}"], "runs rm: nobody is here to be asked; give --yes to delete without a question\n"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why_and_deletes_nothing(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, link = made(tmp_path, "run"), tmp_path / "link"
    link.symlink_to(run)
    assert main(["runs", *(word.format(run=run, link=link) for word in words)]) == 2
    assert capsys.readouterr().err == message.format(run=run, link=link)
    assert (run / "job.yaml").is_file()


def test_rm_deletes_the_runs_it_was_given_and_follows_no_link_out_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs_folder, outside = tmp_path / "runs", tmp_path / "outside"
    one, two, kept = (made(runs_folder, name) for name in ("one", "two", "kept"))
    outside.mkdir()
    (outside / "precious").write_text("x")
    (one / "link").symlink_to(outside)
    (one / "checkpoints").mkdir()
    (one / "checkpoints" / "w").write_bytes(bytes(5000))
    assert main(["runs", "rm", "--yes", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert f"{one}: before its first step, 5." in out
    assert f"Deleted: {two}\n" in out
    assert list(runs_folder.iterdir()) == [kept]
    assert (outside / "precious").read_text() == "x"


def test_a_listing_says_how_far_each_run_is_as_a_table_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(made(tmp_path, "done"), 0.91, [0.91])
    made(tmp_path, "killed")
    (made(tmp_path, "running") / "progress.json").write_text('{"step": 3, "steps_total": 54}')
    assert main(["runs", "ls", str(tmp_path)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[1] == ["done", "finished", "91.00", "%", "-", "1234", "1:15", "-"]
    assert table[2][:5] == ["killed", "before", "its", "first", "step"]
    assert table[3][:3] == ["running", "step", "3/54"]
    assert main(["runs", "ls", "--json", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["finished", "before its first step", "step 3/54"]
    assert (rows[0]["val_top1"], rows[0]["images_per_second"], rows[1]["val_top1"]) == (0.91, 1234.4, None)


def test_a_run_that_was_killed_shows_its_attempts_and_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path, "killed")
    (run / "attempts.json").write_text('[{"attempt": 1, "first_step": 0, "last_step": null, "run_id": "x"}]')
    (run / "checkpoints" / "step_000000007").mkdir(parents=True)
    assert main(["runs", "show", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["killed: before its first step", "  attempt 1: steps 0 on"]
    assert lines[2].startswith("  checkpoint at step 7: ") and "valid" not in lines[2]
    assert main(["runs", "show", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["run"], shown["attempt_list"][0]["last_step"], shown["checkpoints"][0]["step"]) == ("killed", None, 7)


def test_rm_refuses_a_run_that_is_being_driven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path, "busy")
    with Lease(RunFolder(run)):
        assert main(["runs", "rm", "--yes", str(run)]) == 1
    assert f"busy: this run is already being driven by process {os.getpid()} on " in capsys.readouterr().err
    assert (run / "job.yaml").is_file()
    assert main(["runs", "rm", "--yes", str(run)]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "deleted"), [("y", True), ("YES ", True), ("", False), ("n", False), ("run", False)]
)
def test_rm_does_what_the_answer_says(
    answer: str, deleted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path, "run")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        return answer

    assert runs.rm([run], confirmed=False, ask=ask) == 0
    assert questions == ["Delete it for good? [y/N] "]
    assert run.exists() is not deleted


def test_the_page_of_a_run_of_many_classes_names_the_pairs_confused_most(tmp_path: Path) -> None:
    run, classes = made(tmp_path, "one"), [f"c{i}" for i in range(400)]
    matrix = [[0] * 400 for _ in classes]
    matrix[3][3], matrix[3][7], matrix[399][0] = 50, 12, 13
    (run / "confusion.json").write_text(json.dumps({"classes": classes, "matrix": matrix}))
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(page)]) == 0
    text = page.read_text()
    assert "the 2 pairs confused most" in text
    assert text.index("<td>c399</td><td>c0</td><td>13</td>") < text.index("<td>c3</td><td>c7</td><td>12</td>")
    assert len(text) < 50_000, "a cell for each pair of 1000 classes makes 200 MB"


def test_a_page_that_cannot_be_written_is_told_with_another_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path, "one")
    (run / "report.html").mkdir()
    assert main(["report", str(run)]) == 2
    said = f"{run / 'report.html'}: cannot be written: Is a directory; choose another place with --out\n"
    assert capsys.readouterr().err == said
    assert sorted(path.name for path in run.iterdir()) == ["job.yaml", "report.html"]


def test_a_run_has_the_name_that_the_listing_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "within").mkdir()
    for name in ("one", "two"):
        finish(made(tmp_path / "runs", name), 0.9, [0.8, 0.9])
    for place in (tmp_path, tmp_path / "within"):
        monkeypatch.chdir(place)
        assert main(["runs", "show", "one"]) == 0
        assert capsys.readouterr().out.startswith("one: finished, val top-1 90.00 %")
        assert main(["runs", "compare", "one", "two"]) == 0
        assert capsys.readouterr().out.split()[:3] == ["result", "one", "two"]
    assert main(["runs", "prune", "one", "--dry-run"]) == 0
    assert main(["runs", "verify", "one"]) == 4
    assert "runs/one: has no checkpoint" in capsys.readouterr().err
    assert main(["runs", "rm", "two", "--yes"]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]


def test_what_lies_here_is_meant_before_a_run_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "runs", "one")
    (tmp_path / "one").mkdir()
    assert main(["runs", "rm", "one", "--yes"]) == 4
    assert capsys.readouterr().err == "one: not a run folder (no job.yaml in it); give RUNS/NAME\n"
    assert (tmp_path / "runs" / "one" / "job.yaml").exists()


def test_an_unfinished_run_is_listed_with_what_is_last_known_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, done = RunFolder(made(tmp_path, "stopped")), made(tmp_path, "done")
    finish(done, 0.95, [0.8, 0.95])
    folder.progress.write_text('{"step": 25, "steps_total": 40}')
    folder.attempts.write_text(json.dumps([{"attempt": n, "first_step": 0, "last_step": None} for n in (1, 2)]))
    for step, top1 in ((10, 0.5), (20, 0.625), (24, None)):
        layers = None if top1 is None else [0.25, top1]
        folder.append_event(
            {"event": "epoch", "step": step, "val_top1": top1, "val_top5": None, "layer_val_top1": layers}
        )
    folder.append_event({"event": "checkpoint", "step": 24})
    assert main(["runs", "ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == [
        "stopped", "step", "25/40", "62.50", "%", "-", "-", "-", "2",
    ]  # fmt: skip
    assert main(["runs", "show", str(folder.path)]) == 0
    assert capsys.readouterr().out.startswith("stopped: step 25/40, val top-1 62.50 %\n")
    assert main(["runs", "compare", str(done), str(folder.path)]) == 0
    found = {line.split("  ")[0]: line.split()[-4:] for line in capsys.readouterr().out.splitlines()}
    assert found["status"][-3:] == ["finished", "step", "25/40"]
    assert found["val top-1"] == ["95.00", "%", "62.50", "%"]
    assert found["layer 1 val top-1"] == ["95.00", "%", "62.50", "%"]
