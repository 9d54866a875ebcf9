"""A registered network answers arrays and image files with the classes that its weights give, wherever it is asked."""

from __future__ import annotations

import base64
import json
import os
import runpy
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from orchestrator.data.images.decode import decode
from orchestrator.data.index import Index, open_index
from orchestrator.data.packing.pack import pack
from orchestrator.data.reader import ShardReader
from orchestrator.data.split import split_from_train
from orchestrator.errors import OrchestratorError
from orchestrator.run.inference.evaluate_run import evaluate_run
from orchestrator.run.inference.logged_model import log_model
from orchestrator.run.inference.trained import trained_run
from orchestrator.run.records import tracking
from tests.conftest import ROOT, environment
from tests.processes import free_port
from tests.run.inference.made_run import made_run, reference_scores

DIGITS = """\
kind: train
name: made
runs: {runs}
data: digits
model: {{arch: vgg, widths: [6, 8, 10], pool_after: [1], head_grid: 3, vote: [1, 0, 2]}}
objective: {{name: hff, prototypes_per_class: 2}}
train: {{epochs: 1, global_batch_size: 10, lr: 1e-3, precision: {precision}}}
"""
pytestmark = pytest.mark.filterwarnings("ignore")  # of MLflow and its database layer


@dataclass(frozen=True)
class Registered:
    """A registered network, and all validation images of its run with their classes by the reference."""

    uri: str
    model_uri: str
    run: Path
    files: list[bytes]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: NDArray[np.int64]


def files_of(index: Index, samples: Any) -> list[bytes]:
    reader = ShardReader(index)
    return [reader.read(int(i))[2] for i in samples]


def pixels_of(files: list[bytes]) -> NDArray[np.uint8]:
    return np.stack([decode(data, image_size=8, channels=1) for data in files])


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, shared_database: Path) -> Registered:
    from mlflow.tracking import MlflowClient

    folder = tmp_path_factory.mktemp("registry")
    pack("digits", folder / ".data" / "digits")
    index = open_index(folder / ".data" / "digits")
    train, val = split_from_train(index, 0.25)
    lessons = (pixels_of(files_of(index, train)), index.labels[train].astype(np.int64))
    run = made_run(folder, text=DIGITS, classes=[str(i) for i in range(10)], lessons=lessons)
    files = files_of(index, val)
    images = pixels_of(files)
    uri = f"sqlite:///{shared_database}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("registry", artifact_location=(folder / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    trained = trained_run(run)
    logged = log_model(uri, run_id, trained.weights, trained.description, "registered-digits")
    assert logged.warning is None
    assert logged.version == "1"
    classes = reference_scores(run, images).argmax(axis=1)
    assert (classes == index.labels[val]).mean() > 0.5, "a network that has learned nothing proves little"
    return Registered(uri, "models:/registered-digits/1", run, files, images, index.labels[val], classes)


@pytest.fixture
def model(registered: Registered, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    import mlflow

    mlflow.set_tracking_uri(registered.uri)
    return mlflow.pyfunc.load_model(registered.model_uri)


def base64_of(files: list[bytes]) -> list[str]:
    return [base64.b64encode(data).decode() for data in files]


def test_arrays_and_files_give_the_classes_of_the_reference_and_the_accuracy_of_eval(
    model: Any, registered: Registered
) -> None:
    of_arrays = model.predict(registered.images)
    assert (of_arrays.dtype, of_arrays.shape) == (np.float32, (len(registered.files), 10))
    np.testing.assert_allclose(of_arrays, reference_scores(registered.run, registered.images), atol=1e-4, rtol=0)
    assert np.array_equal(of_arrays.argmax(axis=1), registered.classes)
    for form in (
        pd.DataFrame({"image": registered.files}),
        np.array(registered.files, dtype=object),
        pd.DataFrame({"image": base64_of(registered.files)}),
    ):
        assert np.array_equal(model.predict(form).argmax(axis=1), registered.classes)
    right = (of_arrays.argmax(axis=1) == registered.labels).mean()
    assert evaluate_run(registered.run, None)["top1"] == pytest.approx(right)


def test_mlflow_has_nothing_to_say_about_the_code_of_the_model() -> None:
    """It looks when the class is made, at every log and load."""
    import mlflow.pyfunc  # noqa: F401  which warns of itself

    code = ROOT / "orchestrator" / "run" / "inference" / "served_model.py"
    with warnings.catch_warnings(record=True) as said:
        runpy.run_path(str(code), run_name="orchestrator.again")
    assert said == []


def test_the_registered_model_carries_signature_example_and_class_names(model: Any) -> None:
    assert model.metadata.metadata["classes"] == [str(i) for i in range(10)]
    signature = model.metadata.signature
    assert signature.outputs.inputs[0].shape == (-1, 10)
    assert signature.inputs is not None
    assert model.predict(model.input_example).shape == (1, 10)


def test_the_scoring_route_takes_nested_lists_and_base64(model: Any, registered: Registered) -> None:
    """The route of `mlflow models serve` without its server: what it does with the JSON of a request."""
    from mlflow.pyfunc.scoring_server import invocations

    texts = base64_of(registered.files[:20])
    for request in (
        {"inputs": registered.images[:20].tolist()},
        {"inputs": texts},
        {"dataframe_records": [{"image": text} for text in texts]},
        {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
    ):
        answer = invocations(json.dumps(request), "application/json", model, model.metadata.get_input_schema())
        assert answer.status == 200
        found = np.array(json.loads(answer.response)["predictions"]).argmax(axis=1)
        assert np.array_equal(found, registered.classes[:20])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 9, 9, 1), dtype=np.uint8), r"must be uint8 of shape \(N, 8, 8, 1\).*got uint8 \(2, 9, 9, 1\)"),
        (np.zeros((2, 8, 8, 1)), r"must be uint8 .* got float64"),
        (np.full((1, 8, 8, 1), 256), r"must be uint8 .* got int64"),
        (np.array([b"GIF89a"], dtype=object), "image 0: neither JPEG nor PNG"),
        (np.array(["?"], dtype=object), "image 0: "),
    ],
)
def test_what_is_no_image_is_refused_with_what_is_wanted(model: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.predict(given)


def test_a_database_that_cannot_be_made_is_an_error_before_training_and_a_warning_after_it(
    registered: Registered, tmp_path: Path
) -> None:
    trained = trained_run(registered.run)
    (tmp_path / "file").write_text("in the way")
    uri = f"sqlite:///{tmp_path}/file/x.db"
    with pytest.raises(OrchestratorError) as refused:
        tracking.create_run(uri, "e", "n", params={}, tags={}, artifacts=tmp_path)
    first, remedy = str(refused.value).splitlines()
    assert first.startswith(f"tracking.uri: {uri} cannot be used: ")
    assert remedy.startswith("Start the server, correct tracking.uri, or leave it out")
    logged = log_model(uri, "0" * 32, trained.weights, trained.description, "name")
    assert logged.version is None
    assert logged.warning is not None
    assert logged.warning.startswith("MLflow: the network could not be logged: ")
    ended = tracking.finish_run(uri, "0" * 32, "FINISHED")
    assert ended is not None
    assert ended.startswith("MLflow: the run's end could not be logged: ")


@pytest.fixture
def server(registered: Registered) -> Iterator[str]:
    """`mlflow models serve` of the registered model in this environment, on loopback."""
    port = free_port()
    command = [Path(sys.executable).parent / "mlflow", "models", "serve", "-m", registered.model_uri]
    process = subprocess.Popen(
        [*command, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)],
        env=serving_environment(registered), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended before it answered"
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, 15)  # its own session: the server and what it started, nobody else's
        process.wait(30)


def serving_environment(registered: Registered) -> dict[str, str]:
    return {
        **environment(),
        "MLFLOW_TRACKING_URI": registered.uri,
        "MLFLOW_REGISTRY_URI": registered.uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


@pytest.mark.slow
def test_a_served_model_answers_files_and_arrays_over_http(server: str, registered: Registered) -> None:
    for request in (
        {"dataframe_records": [{"image": text} for text in base64_of(registered.files)]},
        {"inputs": registered.images.tolist()},
    ):
        call = urllib.request.Request(
            f"{server}/invocations", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call, timeout=60) as answer:
            found = np.array(json.load(answer)["predictions"]).argmax(axis=1)
        assert np.array_equal(found, registered.classes)


@pytest.mark.slow
def test_mlflow_models_predict_answers_a_file_of_base64(registered: Registered, tmp_path: Path) -> None:
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps({"inputs": base64_of(registered.files[:9])}))
    command = [Path(sys.executable).parent / "mlflow", "models", "predict", "-m", registered.model_uri]
    done = subprocess.run(
        [*command, "--env-manager", "local", "-i", source, "-o", target, "-t", "json"],
        env=serving_environment(registered), capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = np.array(json.loads(target.read_text())["predictions"]).argmax(axis=1)
    assert np.array_equal(found, registered.classes[:9])
