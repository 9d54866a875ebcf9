"""Checkpoints: one pair of files per layer, a state and a manifest that is written last.

A folder counts only when its manifest is there and every file has the size and SHA-256 that it states.
The files of a layer do not know how many workers wrote them, so any number of workers can read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hff.averages import WeightAverage
from hff.layers import LocalLayer
from orchestrator.errors import CheckpointError, OrchestratorError
from orchestrator.run.folder import RunFolder, read_json, write_atomically, write_json

_STEP = re.compile(r"step_(\d{9})")
_FORMAT = 1
# Before the names of weights that learn, where others count: optimizer slots stand behind a name.
_LEARNING = "learning/"


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint as the manifest names it."""

    name: str
    bytes: int
    sha256: str


def step_folder(folder: RunFolder, step: int) -> Path:
    """Where the checkpoint after `step` steps lies when it is whole."""
    return folder.checkpoints / f"step_{step:09d}"


def step_of(where: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(where.name.removeprefix("step_"))


def temporary_folder(folder: RunFolder, step: int, attempt: int) -> Path:
    """Where an attempt writes it before."""
    return folder.checkpoints / f".step_{step:09d}.attempt-{attempt}.tmp"


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _flushed(path: Path) -> FileEntry:
    """The entry of a file that was just written, once it is on the disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        size = os.fstat(f.fileno()).st_size
    return FileEntry(path.name, size, _sha256(path))


def _on_cpu(tensor: Tensor, *, apart: bool = False) -> Tensor:
    """Contiguous; `apart` from the tensor, so that no later change of it shows, else perhaps the tensor itself."""
    found = tensor.detach().cpu().contiguous()
    return found.clone() if apart and found.data_ptr() == tensor.data_ptr() else found


def layer_tensors(layer: LocalLayer, *, apart: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by name, on the CPU, contiguous and none in the memory of another."""
    return unshared({k: _on_cpu(v, apart=apart) for k, v in layer.state_dict().items()})


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, a copy where one shares memory with another before it: safetensors would refuse tied weights."""
    taken: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return found


def layer_sha256(layer: LocalLayer) -> str:
    """Hash of all parameters and buffers of a layer, names and shapes included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(layer_tensors(layer).items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_sha256(per_layer: Iterable[str]) -> str:
    """Hash of the whole network from its layers' hashes, in layer order."""
    return hashlib.sha256("\n".join(per_layer).encode()).hexdigest()


def _optimizer_tensors(layer: LocalLayer, optimizer: torch.optim.Optimizer, *, apart: bool) -> dict[str, Tensor]:
    names = {id(p): name for name, p in layer.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[id(parameter)]}/{key}"] = _on_cpu(value, apart=apart)
    return dict(sorted(tensors.items()))


@dataclass(frozen=True)
class LayerState:
    """Weights and optimizer state of one layer by name, on the CPU."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def layer_state(
    layer: LocalLayer, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None, *, apart: bool = False
) -> LayerState:
    """What a checkpoint has of a layer; `apart`: in memory of its own, which further training does not change.

    Of a layer with an `average`, that is what its weights are for everybody; those that learn lie with the optimizer.
    """
    weights = layer_tensors(layer, apart=apart)
    learning = _optimizer_tensors(layer, optimizer, apart=apart)
    if average is not None:
        learning |= {f"{_LEARNING}{name}": weights[name] for name in average.weights}
        weights |= {name: _on_cpu(value, apart=apart) for name, value in average.weights.items()}
    return LayerState(weights, dict(sorted(learning.items())))


def save_layer(where: Path, index: int, state: LayerState) -> list[FileEntry]:
    """Write one layer's weights and optimizer state into the folder `where`."""
    where.mkdir(parents=True, exist_ok=True)
    weights = where / f"layer_{index:02d}.safetensors"
    optimizer = where / f"layer_{index:02d}.optim.safetensors"
    save_file(dict(sorted(state.weights.items())), weights)
    save_file(dict(state.optimizer), optimizer)
    return [_flushed(weights), _flushed(optimizer)]


def _manifest_text(step: int, files: Iterable[FileEntry]) -> str:
    """The manifest, byte for byte, with a hash of its own content: no flipped bit of it goes unseen."""
    content = {"format": _FORMAT, "step": step, "files": [vars(e) for e in sorted(files, key=lambda e: e.name)]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1) + "\n"


def commit(folder: RunFolder, step: int, attempt: int, state: Mapping[str, Any], entries: Iterable[FileEntry]) -> Path:
    """Add state and manifest, then give the finished folder its name.

    Raises OrchestratorError when a later attempt has begun: whoever was left of this one writes no more.
    """
    begun = max((entry["attempt"] for entry in read_json(folder.attempts) or []), default=attempt)
    if begun > attempt:
        raise OrchestratorError(f"attempt {attempt} saves no more: attempt {begun} of {folder.path.name} has begun")
    where = temporary_folder(folder, step, attempt)
    where.mkdir(parents=True, exist_ok=True)
    write_json(where / "state.json", dict(state))
    files = [*entries, _flushed(where / "state.json")]
    assert len({entry.name for entry in files}) == len(files), "one worker writes a file, however many replicas"
    write_atomically(where / "manifest.json", _manifest_text(step, files))
    final = step_folder(folder, step)
    if final.exists():
        # The same step saved twice (a resumed run that had already saved it): the newer replaces the older.
        shutil.rmtree(final)
    os.rename(where, final)
    descriptor = os.open(folder.checkpoints, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return final


def steps_found(folder: RunFolder) -> list[int]:
    """Steps of all checkpoint folders, valid or not, oldest first."""
    if not folder.checkpoints.is_dir():
        return []
    matches = (_STEP.fullmatch(p.name) for p in folder.checkpoints.iterdir())
    return sorted(int(m.group(1)) for m in matches if m)


def manifest_entries(content: bytes) -> list[FileEntry]:
    """The files that a manifest names. Raises ValueError for one that is damaged."""
    try:
        text = content.decode()
        manifest = json.loads(text)
        expected = [FileEntry(**entry) for entry in manifest["files"]]
        whole = text == _manifest_text(manifest["step"], expected)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"manifest.json cannot be read: {error}") from None
    if not whole:
        raise ValueError("manifest.json is damaged: its SHA-256 is not the one that it states")
    return expected


def problems(where: Path) -> list[str]:
    """What is wrong with a checkpoint folder; empty when it is valid."""
    try:
        expected = manifest_entries((where / "manifest.json").read_bytes())
    except FileNotFoundError:
        return ["manifest.json is missing"]
    except ValueError as error:
        return [str(error)]
    return [found for entry in expected if (found := fault(where, entry)) is not None]


def fault(where: Path, entry: FileEntry) -> str | None:
    """What is wrong with one file of a checkpoint folder; None when it is whole."""
    path = where / entry.name
    if not path.is_file():
        return f"{entry.name} is missing"
    if path.stat().st_size != entry.bytes:
        return f"{entry.name} has {path.stat().st_size} bytes, expected {entry.bytes}"
    return None if _sha256(path) == entry.sha256 else f"{entry.name} is damaged: its SHA-256 is not the manifest's"


def newest_valid(folder: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a warning for each newer one that is not.

    Raises CheckpointError when there are checkpoints and all are damaged: starting afresh is the user's
    decision, never ours.
    """
    warnings: list[str] = []
    steps = steps_found(folder)
    for step in reversed(steps):
        where = step_folder(folder, step)
        wrong = problems(where)
        if not wrong:
            return where, warnings
        warnings.append(f"{where.name}: {'; '.join(wrong)}; going back to the one before")
    if steps:
        raise CheckpointError(
            f"{folder.checkpoints}: no checkpoint is whole:\n  "
            + "\n  ".join(warnings)
            + "\nUse --resume never to start afresh (this folder is renamed, not deleted)."
        )
    return None, warnings


def read_state(where: Path) -> dict[str, Any]:
    """The state of the run beside its layers: step, ledger, seconds, what `Loop._save` puts there."""
    state: dict[str, Any] = json.loads((where / "state.json").read_text(encoding="utf-8"))
    return state


def load_layer(
    where: Path,
    index: int,
    layer: LocalLayer,
    optimizer: torch.optim.Optimizer | None = None,
    average: WeightAverage | None = None,
) -> None:
    """Read one layer's weights, and its optimizer state where `optimizer` is given.

    With `average` they are the average's too; with both, the layer gets those that were learning. Raises
    CheckpointError naming the file when it is missing or does not fit the layer.
    """
    path = where / f"layer_{index:02d}.safetensors"
    try:
        layer.load_state_dict(load_file(path))
        if average is not None:
            average.restart()
        if optimizer is not None:
            path = where / f"layer_{index:02d}.optim.safetensors"
            tensors = load_file(path)
            if average is not None:
                average.restore({name: tensors.pop(f"{_LEARNING}{name}") for name in average.weights})
            _restore_optimizer(layer, optimizer, tensors)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path}: does not fit layer {index}: {error}") from error


def _restore_optimizer(layer: LocalLayer, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(layer.named_parameters())
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        # torch keeps step counters on the CPU; everything else lies with the parameter.
        if slot != "step":
            # In the parameter's own memory layout, so that updates stay fast.
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][slot] = value


def fork(source: Path, folder: RunFolder) -> None:
    """Give a run that has no checkpoint yet a copy of another run's, so that it goes on from there."""
    if steps_found(folder):
        return
    # Copied under the name of a leftover, so that half a copy is deleted and never taken for a checkpoint.
    temporary = folder.checkpoints / f".{source.name}.fork.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    os.rename(temporary, folder.checkpoints / source.name)


def prune(folder: RunFolder, keep_last: int, saved: int) -> None:
    """Delete all checkpoints up to the step `saved` but the newest `keep_last`.

    Later ones are damaged, since a run goes on from the newest whole one: they take no place of those that count.
    """
    for step in [step for step in steps_found(folder) if step <= saved][:-keep_last]:
        shutil.rmtree(step_folder(folder, step))


def remove_leftovers(folder: RunFolder) -> None:
    """Delete what an interrupted save, or a file that was being replaced, left behind.

    What this process writes at this moment, in the threads beside a drive, is none of it.
    """
    for path in folder.checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(path)
    for path in folder.path.rglob(".*.tmp"):
        if f".{os.getpid()}-" not in path.name:
            path.unlink(missing_ok=True)
