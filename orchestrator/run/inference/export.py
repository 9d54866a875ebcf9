"""A run's network as one file for other programs: torch.export, ONNX or safetensors; its trunk alone for timm.

The first three take uint8 images (N, H, W, C) and give the scores (N, classes) of `classifier.Classifier`, with the
normalisation inside, for any N. Each is read back and compared with the network before it gets its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from orchestrator.errors import CheckpointError, JobError, OrchestratorError, first_line
from orchestrator.job.own_code import is_own
from orchestrator.run import checkpoint, network
from orchestrator.run.inference.classifier import Classifier
from orchestrator.run.inference.trained import TrainedRun, trained_run, vote_weights

Scores = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

# A score is the sum of logarithms down to about -2 * scale, where float32 is that much coarser.
ABSOLUTE, RELATIVE = 1e-4, 1e-5
_DESCRIPTION = "model.json"
_TRACED, _COMPARED = 2, 3


@dataclass(frozen=True)
class Exported:
    """The finished file and how far its scores are from those of the run's network at most; None without scores."""

    path: Path
    difference: float | None


def export_run(run: Path, form: str, out: Path | None = None, *, replace: bool = False) -> Exported:
    """Write the network of `run` as `form`, one of FORMATS, to `out` (default: in RUN, under the form's own name).

    Raises JobError when a package or a trunk is missing or `out` cannot be written, CheckpointError without a
    checkpoint.
    """
    chosen = FORMATS[form]
    missing = [name for name in chosen.packages if find_spec(name) is None]
    if missing:
        raise JobError(
            f"--format {form}: needs {' and '.join(missing)}, got no such package here; "
            "install what is missing with: pip install 'hff-orchestrator[onnx]'"
        )
    trained = trained_run(run)
    path = run / chosen.name if out is None else out
    if path.is_dir() or not path.parent.is_dir():
        raise JobError(f"--out: must be a file in a folder that is there, got {path}")
    if path.exists() and not replace:
        raise JobError(f"{path}: is there already; give --force to replace it, or --out FILE for another place")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{Path(chosen.name).suffix}")
    try:
        _write(trained, form, temporary)
        difference = None if chosen.read is None else _compare(trained, chosen.read(temporary))
        _settle(temporary, path)
    except OSError as error:
        raise JobError(f"--out: must be a place that can be written, got {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, difference)


def _write(trained: TrainedRun, form: str, path: Path) -> None:
    """Write the file. Raises JobError where torch cannot trace the code of a user's network."""
    own = is_own(trained.description["model"]) or is_own(trained.description["objective"])
    try:
        FORMATS[form].write(trained, path)
    except Exception as error:  # torch raises whatever that code makes it stumble over
        if not own or isinstance(error, (OSError, OrchestratorError)):
            raise
        raise JobError(
            f"--format {form}: torch cannot trace the code of this network for any number of images: "
            f"{first_line(error)}; change the code, or take --format safetensors, which keeps it as it is"
        ) from error


def load_safetensors(path: Path, *, run_its_code: bool = False) -> tuple[Classifier, dict[str, Any]]:
    """The network of an exported .safetensors file and its description (classes, model, data, precision).

    A network with a model or objective of its user's own holds that code, which is run with `run_its_code` alone.
    Raises CheckpointError without it, and when the file does not hold a network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            description: dict[str, Any] = json.loads(file.metadata()[_DESCRIPTION])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (is_own(description["model"]) or is_own(description["objective"])) and not run_its_code:
            raise ValueError("it holds code of its own; pass run_its_code=True where you trust it")
        layers = network.rebuild(description)
        classifier = Classifier(layers, vote_weights(description, len(layers)), description["data"])
        classifier.network.load_state_dict(tensors)
    except Exception as error:  # whatever safetensors, json and torch raise for a foreign file means the same
        raise CheckpointError(f"{path}: is not a network exported by `orchestrator export`: {error}") from error
    return classifier, description


def _write_safetensors(trained: TrainedRun, path: Path) -> None:
    state = trained.classifier().network.state_dict()
    tensors = checkpoint.unshared({name: tensor.contiguous() for name, tensor in state.items()})
    with _usual_mode(path):
        save_file(tensors, path, metadata={"format": "pt", _DESCRIPTION: json.dumps(trained.description)})


@contextmanager
def _usual_mode(path: Path) -> Iterator[None]:
    """safetensors makes files that nobody else can read; a file made in this block is like any other."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def _read_safetensors(path: Path) -> Scores:
    classifier, _ = load_safetensors(path, run_its_code=True)
    return lambda images: _eager(classifier, images)


def _write_torch(trained: TrainedRun, path: Path) -> None:
    classifier = trained.classifier().float()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(classifier, (_example(trained, _TRACED),), dynamic_shapes=({0: batch},))
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={_DESCRIPTION: json.dumps(trained.description)})


def _read_torch(path: Path) -> Scores:
    module = torch.export.load(path).module()
    return lambda images: _eager(module, images)


def _write_onnx(trained: TrainedRun, path: Path) -> None:
    classifier = trained.classifier().float()
    program = torch.onnx.export(
        classifier,
        (_example(trained, _TRACED),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["images"],
        output_names=["scores"],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[_DESCRIPTION] = json.dumps(trained.description)
    program.save(path)


def _read_onnx(path: Path) -> Scores:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def scores(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(["scores"], {"images": images})[0]
        return found

    return scores


def _write_trunk(trained: TrainedRun, path: Path) -> None:
    from orchestrator.transfer.weights import save_trunk

    if "backbone" not in trained.job["model"]:
        raise JobError(
            f"--format timm: needs a run of kind transfer, got kind {trained.job['kind']}, which has no trunk"
        )
    about = {"backbone": trained.job["model"]["backbone"], "run": trained.name, "classes": trained.classes}
    with _usual_mode(path):
        save_trunk(trained.layers(), path, about)


@dataclass(frozen=True)
class Form:
    """A form of file: its usual name, who writes it, who reads it back for the comparison, what both need."""

    name: str
    write: Callable[[TrainedRun, Path], None]
    read: Callable[[Path], Scores] | None = None
    packages: tuple[str, ...] = ()


FORMATS = {
    "torch-export": Form("network.pt2", _write_torch, _read_torch),
    "onnx": Form("network.onnx", _write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "safetensors": Form("network.safetensors", _write_safetensors, _read_safetensors),
    "timm": Form("network.timm.safetensors", _write_trunk),
}


def _example(trained: TrainedRun, count: int) -> torch.Tensor:
    """`count` images of noise."""
    data = trained.description["data"]
    shape = (count, data["image_size"], data["image_size"], data["channels"])
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def _eager(module: torch.nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.no_grad():
        scores: NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
    return scores


def _compare(trained: TrainedRun, exported: Scores) -> float:
    """The greatest difference of any score, on a batch of another size than the one that was traced."""
    images = _example(trained, _COMPARED).numpy()
    expected, found = _eager(trained.classifier(), images), exported(images)
    difference = float(np.abs(expected - found).max())
    if not np.allclose(found, expected, atol=ABSOLUTE, rtol=RELATIVE):
        raise OrchestratorError(
            f"the exported network gives other scores than the run's (by up to {difference:.2g}); nothing was written"
        )
    return difference


def _settle(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
