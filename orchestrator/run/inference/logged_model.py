"""The final network in MLflow: models-from-code over safetensors, and its entry in the model registry."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.images.decode import encode_png
from orchestrator.errors import first_line
from orchestrator.run.folder import write_json
from orchestrator.run.records.tracking import client_of


@dataclass(frozen=True)
class Logged:
    """What came of it: the version under the registered name, if one was asked for; a warning if it failed."""

    version: str | None = None
    warning: str | None = None


def log_model(
    uri: str,
    run_id: str,
    weights: Path,
    description: Mapping[str, Any],
    registered_name: str | None = None,
    card: str = "",
) -> Logged:
    """Log the network of the checkpoint folder `weights`, and register it under `registered_name`.

    `description` says how to rebuild it (`network.description`). The class names are in the model's metadata; the
    registry shows `card`, Markdown, beside its version.
    Returns a warning instead of raising: a finished run must not fail for its tracking.
    """
    try:
        with client_of(uri) as client, tempfile.TemporaryDirectory() as scratch, _quiet():
            folder = _network_folder(Path(scratch), weights, description)
            version = _log(uri, run_id, folder, description, registered_name)
            if version is not None and card:
                client.update_model_version(registered_name, version, description=card)
    except Exception as error:  # mlflow raises its own, requests' and sqlalchemy's errors alike
        return Logged(warning=f"MLflow: the network could not be logged: {first_line(error)}")
    return Logged(version=version)


def _network_folder(scratch: Path, weights: Path, description: Mapping[str, Any]) -> Path:
    folder = scratch / "network"
    folder.mkdir()
    for path in sorted(weights.glob("layer_[0-9]*.safetensors")):
        if ".optim." not in path.name:
            shutil.copy(path, folder)
    write_json(folder / "model.json", dict(description))
    return folder


def _log(
    uri: str, run_id: str, folder: Path, description: Mapping[str, Any], registered_name: str | None
) -> str | None:
    import mlflow

    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="network",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"network": str(folder)},
            signature=_signature(len(description["classes"])),
            input_example=_example(description["data"]),
            metadata={"classes": list(description["classes"]), "data": dict(description["data"])},
            registered_model_name=registered_name,
            pip_requirements=["hff-orchestrator"],
        )
    return None if registered_name is None else str(info.registered_model_version)


def _signature(classes: int) -> Any:
    """Anything along the first axis in, scores out.

    MLflow lets a model have one form of input. This is the only one that lets images as arrays of uint8 through,
    and files as bytes and as the base64 text of JSON; what came is checked by the model itself.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    images = TensorSpec(np.dtype(object), (-1,))
    scores = TensorSpec(np.dtype(np.float32), (-1, classes))
    return ModelSignature(inputs=Schema([images]), outputs=Schema([scores]))


def _example(data: Mapping[str, Any]) -> Any:
    """One PNG file in a table: a request that shows how JSON carries images, and small at any size."""
    import pandas

    size = data["image_size"]
    rising = np.linspace(0, 255, size * size, dtype=np.uint8).reshape(size, size, 1)
    return pandas.DataFrame({"image": [encode_png(np.repeat(rising, data["channels"], axis=2))]})


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow's own advice on stderr is not for the user of a job."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        yield
