"""One small run from the command line to MLflow and back: files, metrics, model, report, and running it again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.index import open_index
from orchestrator.data.reader import ShardReader
from orchestrator.run import checkpoint
from orchestrator.run.folder import RunFolder
from tests.conftest import ROOT, SUMMARY_KEYS, TINY_JOB, Command, environment
from tests.runs import weights_sha256_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run with two stages, its summary file and what it printed."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("whole")
    job = folder / "tiny.yaml"
    job.write_text(TINY_JOB.format(name="tiny", runs=folder / "runs"))
    flags = ["--set", "cluster.workers=2", "--set", "cluster.stages=2", "--set", "train.epochs=4"]
    flags += ["--set", "tracking.registered_model=tiny-digits", "--set", "tracking.trace_steps=3"]
    command = [sys.executable, "-m", "orchestrator", "run", str(job), *flags, "--summary", str(folder / "s.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        "folder": folder, "job": job, "flags": flags, "run": folder / "runs" / "tiny", "out": done.stdout,
        "err": done.stderr, "summary": json.loads((folder / "s.json").read_text()),
    }  # fmt: skip


def test_the_summary_is_complete_and_true(finished: dict[str, Any]) -> None:
    s = finished["summary"]
    assert set(s) == SUMMARY_KEYS
    assert (s["status"], s["kind"], s["epochs"], s["steps"]) == ("finished", "train", 4, 4 * 14)
    assert s["samples_per_epoch"] == 1797 - 450
    assert s["samples_seen"] == 4 * s["samples_per_epoch"]
    assert len(s["sample_keys_sha256"]) == 4
    assert len(set(s["sample_keys_sha256"])) == 1, "every epoch consumes the same samples"
    assert s["val_top1"] > 0.9
    assert s["val_top1"] == s["layers"][-1]["val_top1"]
    assert s["attempt_steps"] == [[0, 56]]
    assert 0 < s["pipeline_efficiency"] <= 1
    assert len(s["peak_memory_bytes"]) == s["world_size"] == 2
    assert json.loads((finished["run"] / "summary.json").read_text()) == s
    assert s["weights_sha256"] == weights_sha256_of(finished["run"])


def test_the_keys_consumed_are_those_of_the_index(finished: dict[str, Any]) -> None:
    import hashlib

    from orchestrator.data.split import split_from_train

    index = open_index(finished["folder"] / "runs" / ".data" / "digits")
    train, _ = split_from_train(index, 0.25)
    expected = hashlib.sha256("\n".join(sorted(index.keys(train))).encode()).hexdigest()
    assert finished["summary"]["sample_keys_sha256"][0] == expected
    assert finished["summary"]["index_sha256"] == index.sha256


def test_the_terminal_shows_plan_epochs_result_and_where_to_look_next(finished: dict[str, Any]) -> None:
    out = finished["out"]
    for words in (
        "Plan of tiny: 2 workers, 2 stages",
        "Predicted",
        "epoch   1/4",
        "images/s",
        "Result of tiny",
        "Time of the stages",
        "for sums over replicas",
        "val top-1",
        "orchestrator report",
        "mlflow ui --backend-store-uri",
        "1 loader thread a worker",
        "Bound by ",
    ):
        assert words in out, words
    assert "\x1b" not in out, "escape codes do not belong into a file"
    assert finished["err"] == ""


def test_the_record_of_a_run_names_the_decoder_and_counts_what_was_loaded(finished: dict[str, Any]) -> None:
    events = [json.loads(line) for line in (finished["run"] / "events.jsonl").read_text().splitlines()]
    (start,) = [event for event in events if event["event"] == "start"]
    assert re.fullmatch(r"(simplejpeg|torchvision|pillow) [0-9.]+", start["loader"].pop("decoder"))
    assert start["loader"] == {"threads": 1}
    epochs = [event for event in events if event["event"] == "epoch"]
    samples = start["samples_per_epoch"]
    assert [event["loader"]["images"] for event in epochs] == [samples * n for n in (1, 2, 3, 4)]
    assert all(0 < event["loader"]["decode_s"] < event["loader"]["load_s"] for event in epochs)
    assert all(event["skipped"] == {} for event in epochs)


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer
def test_mlflow_has_parameters_metrics_tags_and_artifacts(finished: dict[str, Any]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{finished['folder'] / 'runs' / 'mlflow.db'}")
    run = client.get_run(finished["summary"]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == "0.005"
    assert not any(key.startswith(("cluster.", "tracking.", "checkpoint.")) for key in run.data.params)
    assert run.data.tags["attempt.1.cluster.workers"] == "2"
    assert run.data.tags["job.kind"] == "train"
    for metric in ("train/loss", "train/images_per_second", "val/top1", "val/top5", "layer/00/val_top1",
                   "layer/02/train_loss", "stage/0/busy_fraction", "stage/1/busy_fraction"):  # fmt: skip
        assert metric in run.data.metrics, metric
    kinds = ("busy", "wait_input", "wait_output", "all_reduce")
    for stage in (0, 1):
        assert sum(run.data.metrics[f"stage/{stage}/{kind}_fraction"] for kind in kinds) == pytest.approx(1)
    assert run.data.metrics["val/top1"] == pytest.approx(finished["summary"]["val_top1"])
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == [14, 28, 42, 56]
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {
        "summary.json", "job.yaml", "accuracy.svg", "trace.json",
    }  # fmt: skip


def test_the_trace_has_every_phase_of_three_steps_of_all_ranks_on_one_clock(finished: dict[str, Any]) -> None:
    events = json.loads((finished["run"] / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        0: "rank 0: stage 0, replica 0", 1: "rank 1: stage 1, replica 0",
    }  # fmt: skip
    for rank in (0, 1):
        own = [e for e in spans if e["pid"] == rank]
        assert {e["args"]["step"] for e in own} == {5, 6, 7}, "behind the warm-up"
        layers = {0: ["conv0"], 1: ["conv1", "conv2"]}
        found = [e["name"] for e in own if e["args"]["step"] == 6]
        of_layers = [f"{phase} {k}" for k in layers[rank] for phase in ("forward", "loss", "gradient", "update")]
        expected = ["receive", *of_layers]
        # The output leaves before the update of its layer.
        assert found == (expected if rank else [*expected[:-1], "send", expected[-1]])
        ends = [e["ts"] + e["dur"] for e in own]
        assert all(e["ts"] >= end for e, end in zip(own[1:], ends, strict=False)), "one thing after the other"
    for step in (5, 6, 7):
        (sent,) = [e for e in spans if (e["args"]["step"], e["cat"]) == (step, "send")]
        (got,) = [e for e in spans if (e["args"]["step"], e["cat"], e["pid"]) == (step, "receive", 1)]
        assert sent["ts"] < got["ts"] + got["dur"], "nothing arrives before it was sent"


@pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer
def test_the_logged_network_loads_without_pickle_and_predicts_like_eval(
    finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import mlflow
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{finished['folder'] / 'runs' / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    experiment = MlflowClient(uri).get_experiment_by_name("orchestrator")
    (logged,) = mlflow.search_logged_models([experiment.experiment_id], output_format="list")
    assert "Registered as models:/tiny-digits/1\n" in finished["out"]
    model = mlflow.pyfunc.load_model("models:/tiny-digits/1")
    assert model.metadata.metadata["classes"] == [str(i) for i in range(10)]
    index = open_index(finished["folder"] / "runs" / ".data" / "digits")
    from orchestrator.data.images.decode import decode
    from orchestrator.data.split import split_from_train

    _, val = split_from_train(index, 0.25)
    files = [ShardReader(index).read(int(i))[2] for i in val]
    images = np.stack([decode(data, image_size=8, channels=1) for data in files])
    scores = model.predict(images)
    assert scores.shape == (len(val), 10)
    right = (scores.argmax(axis=1) == index.labels[val]).mean()
    assert right == pytest.approx(finished["summary"]["val_top1"])
    best_five = np.argsort(-scores, axis=1)[:, :5]
    top5 = (best_five == index.labels[val][:, None]).any(axis=1).mean()
    assert top5 == pytest.approx(finished["summary"]["val_top5"])
    matrix = np.zeros((10, 10), dtype=int)
    np.add.at(matrix, (index.labels[val], scores.argmax(axis=1)), 1)
    assert json.loads((finished["run"] / "confusion.json").read_text())["matrix"] == matrix.tolist()
    inner = model.unwrap_python_model()
    assert np.array_equal(inner.predict(None, files[:20]).argmax(1), scores[:20].argmax(1))
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(N, 8, 8, 1\)"):
        inner.predict(None, np.zeros((2, 9, 9, 1), dtype=np.uint8))
    folder = Path(mlflow.artifacts.download_artifacts(logged.model_uri))
    assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".pth")]


def test_running_it_again_says_that_it_is_finished_and_rewrites_the_summary(
    finished: dict[str, Any], in_process: Command
) -> None:
    again = finished["folder"] / "again.json"
    result = in_process("run", finished["job"], *finished["flags"], "--summary", again)
    assert result.returncode == 0
    assert "is finished already" in result.stdout
    assert json.loads(again.read_text()) == finished["summary"]
    changed = in_process("run", finished["job"], *finished["flags"], "--set", "train.lr=0.5")
    assert changed.returncode == 2
    assert "train.lr: was 0.005, is 0.5" in changed.stderr
    assert "To train longer" not in changed.stderr
    longer = in_process("run", finished["job"], *finished["flags"], "--set", "train.epochs=9")
    assert "start from its weights: --set train.init_from=tiny --set name=OTHER" in longer.stderr


def test_eval_gives_the_accuracy_of_the_summary(finished: dict[str, Any], in_process: Command) -> None:
    out = finished["folder"] / "eval.json"
    result = in_process("eval", finished["run"], "--json", out)
    assert result.returncode == 0, result.stderr
    assert " images held out of " in result.stdout
    found = json.loads(out.read_text())
    assert found["top1"] == pytest.approx(finished["summary"]["val_top1"])
    assert found["layer_top1"] == pytest.approx([x["val_top1"] for x in finished["summary"]["layers"]])


def test_runs_are_listed_shown_and_verified(finished: dict[str, Any], in_process: Command) -> None:
    listing = in_process("runs", "ls", finished["run"].parent)
    assert "tiny" in listing.stdout
    assert "finished" in listing.stdout
    shown = in_process("runs", "show", finished["run"])
    assert "checkpoint at step 56: valid" in shown.stdout
    assert in_process("runs", "verify", finished["run"]).returncode == 0
    assert in_process("runs", "replay", finished["run"]).returncode == 0


def test_the_report_is_one_page_that_needs_nothing_else(finished: dict[str, Any], in_process: Command) -> None:
    page = finished["folder"] / "page.html"
    result = in_process("report", finished["run"], "--out", page)
    assert result.returncode == 0, result.stderr
    text = page.read_text().replace('src="data:image/jpeg;base64,', 'data-jpeg="')  # images in the page itself
    for words in ("Accuracy of each layer over epochs", "Confusion of the final network", "conv0", "weights_sha256"):
        assert words in text, words
    for forbidden in ("<script", "src=", "@import", "url(", 'href="http'):
        assert forbidden not in text, forbidden
    assert text.count("<svg") >= 5
    from html.parser import HTMLParser

    class Balanced(HTMLParser):
        open_tags: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "line", "circle", "rect", "polyline", "br", "img"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if self.open_tags and self.open_tags[-1] == tag:
                self.open_tags.pop()

    parser = Balanced()
    parser.feed(text)
    assert parser.open_tags == []


def test_training_with_shuffled_labels_stays_at_chance(tiny_job: Callable[..., Path], in_process: Command) -> None:
    data = "{train: digits, val: {from_train: 0.25}, image_size: 8, channels: 1, shuffle_labels: true}"
    job = tiny_job("control")
    result = in_process("run", job, "--set", f"data={data}", "--summary", job.with_suffix(".json"))
    assert result.returncode == 0, result.stderr
    assert json.loads(job.with_suffix(".json").read_text())["val_top1"] < 0.2


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    job, run = tiny_job("damaged"), tmp_path / "runs" / "damaged"
    whole = in_process("run", job, "--set", "train.epochs=3", "--set", "checkpoint.keep_last=3")
    assert whole.returncode == 0, whole.stderr
    reference = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    data = bytearray((newest / "layer_01.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "layer_01.safetensors").write_bytes(data)
    resumed = in_process("run", job, "--set", "train.epochs=3", "--set", "checkpoint.keep_last=3")
    assert resumed.returncode == 0, resumed.stderr
    assert "layer_01.safetensors is damaged" in resumed.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weights_sha256"] == reference["weights_sha256"]
    assert summary["order_sha256"] == reference["order_sha256"]
    assert summary["attempt_steps"] == [[0, 42], [28, 42]]
    assert summary["run_id"] == reference["run_id"]
    before = checkpoint.read_state(checkpoint.step_folder(RunFolder(run), 28))["train_seconds"]
    assert summary["wall_seconds"] > before > 0, "the time of all attempts"


def test_a_dead_mlflow_server_is_said_before_training_with_the_remedy(
    tiny_job: Callable[..., Path], in_process: Command
) -> None:
    result = in_process("run", tiny_job(), "--set", "tracking.uri=http://127.0.0.1:9")
    assert result.returncode == 1
    assert "tracking.uri: http://127.0.0.1:9 cannot be used" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_that_diverges_stops_before_the_update_and_names_layer_step_and_images(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path
) -> None:
    flags = ["--set", "objective={name: ce}", "--set", "train.lr_schedule=constant", "--set", "train.lr=1e37"]
    pipeline = ["--set", "cluster.workers=2", "--set", "cluster.stages=2"]
    for name, settings in (("alone", []), ("piped", pipeline)):
        result = in_process("run", tiny_job(name), *flags, *settings)
        assert result.returncode == 1
        first = result.stderr.splitlines()[0]
        found = re.match(r"layer 0 \(conv0\): its loss is not finite at step (\d+); images of that batch: (.*), \.\.\. "
                         r"\(100\); nothing after the last checkpoint is kept: lower train.lr", first)  # fmt: skip
        assert found, result.stderr
        index = open_index(tmp_path / "runs" / ".data" / "digits")
        assert set(found[2].split(", ")) <= set(index.keys(range(len(index.labels))))
        assert int(found[1]) < 14
        assert not list((tmp_path / "runs" / name / "checkpoints").glob("step_*")), "nothing of it was saved"


def test_what_a_run_had_saved_when_it_failed_is_whole_though_the_disk_is_slow(
    tiny_job: Callable[..., Path], in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save after step 1 is under way in the background when the loss of a later step is not finite."""
    write = checkpoint.save_file

    def slowly(*arguments: Any) -> None:
        time.sleep(0.5)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", slowly)
    settings = ("objective={name: ce}", "train.lr_schedule=constant", "train.lr=1e37", "checkpoint.every_steps=1")
    result = in_process("run", tiny_job("slow"), *(word for setting in settings for word in ("--set", setting)))
    found = re.match(r"layer 0 \(conv0\): its loss is not finite at step (\d+)", result.stderr)
    assert found, result.stderr
    folder = RunFolder(tmp_path / "runs" / "slow")
    whole, warnings = checkpoint.newest_valid(folder)
    assert whole == checkpoint.step_folder(folder, int(found[1])), "steps done before the one that failed"
    assert warnings == []
