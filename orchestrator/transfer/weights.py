"""Weights of a trunk from and to a file under timm's own names, with a report of every key that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hff.layers import LocalLayer
from orchestrator.errors import CheckpointError
from orchestrator.transfer.trunk import TrunkStage

_MARK = "trunk."
# Training loops wrap their weights under one of these, and DataParallel puts a word before each name.
_WRAPPERS = ("state_dict", "model", "model_state", "state_dict_ema", "model_ema")
_PREFIX = "module."
_SHOWN = 5
# All tensors of the complete model by name, and timm's own function that renames and resizes those of older files.
Whole = Callable[[], tuple[set[str], Callable[[dict[str, Tensor], Any], dict[str, Tensor]] | None]]


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file; nothing in it can run code. Raises CheckpointError."""
    try:
        if path.endswith(".safetensors"):
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"model.pretrained: {path}: no such file") from None
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"model.pretrained: {path}: cannot be read: {_first_line(error)}") from error
    except Exception as error:
        # pickle's refusals come in several classes; torch explains them at length.
        raise CheckpointError(
            f"model.pretrained: {path}: holds more than tensors, and is not loaded: {_first_line(error)}"
        ) from error
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"model.pretrained: {path}: must hold tensors by name, got a {type(loaded).__name__}")
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    if tensors and all(key.startswith(_PREFIX) for key in tensors):
        tensors = {key[len(_PREFIX) :]: v for key, v in tensors.items()}
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load(path: str, backbone: str, stages: Sequence[TrunkStage], whole: Whole) -> str:
    """Put the tensors of a file into the stages of a trunk; returns a line about what was done.

    Tensors of the complete model that the trunk has no use for (its classifier) may be there or not. Raises
    CheckpointError with every key that is missing, unknown, or of another shape.
    """
    wanted = trunk_tensors(stages)
    given = read(path)
    if _misfits(given, wanted):
        given = _repaired(given, wanted, stages[0].trunk, whole)
    known, _ = whole()
    missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    unknown = [k for k in given if k not in wanted and k not in known]
    reshaped = [
        f"{k} is {tuple(given[k].shape)}, must be {tuple(t.shape)}"
        for k, t in wanted.items()
        if k in given and given[k].shape != t.shape
    ]
    if missing or unknown or reshaped:
        lists = ((missing, "missing"), (unknown, "unknown"), (reshaped, "of another shape"))
        report = "".join(f"\n  {len(keys)} {what}: {_some(keys)}" for keys, what in lists if keys)
        raise CheckpointError(
            f"model.pretrained: {path}: does not fit {backbone} ({len(wanted)} tensors, the file has {len(given)}):"
            f"{report}\nGive the weights of {backbone}, or name the backbone that they belong to."
        )
    with torch.no_grad():
        for key, tensor in wanted.items():
            if key in given:
                tensor.copy_(given[key])
    unused = [k for k in given if k not in wanted]
    rest = f"; left out: {_some(unused)}" if unused else ""
    return f"{path}: {len(given) - len(unused)} tensors of {backbone}{rest}"


def _misfits(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return any(k not in given or given[k].shape != t.shape for k, t in wanted.items())


def _repaired(given: dict[str, Tensor], wanted: Mapping[str, Tensor], model: Any, whole: Whole) -> dict[str, Tensor]:
    """What timm's own filter makes of older names and of position embeddings for another size, if that helps."""
    _, repair = whole()
    if repair is None:
        return given
    try:
        repaired = repair(dict(given), model)
    except Exception:
        # The filter expects a file of its family; for any other, the report of the keys says more than its error.
        return given
    better = sum(k in repaired and repaired[k].shape == t.shape for k, t in wanted.items())
    return repaired if better > sum(k in given and given[k].shape == t.shape for k, t in wanted.items()) else given


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def trunk_tensors(parts: Iterable[torch.nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of the trunk inside modules (stages or layers), by the backbone's own names."""
    found = {}
    for part in parts:
        for key, tensor in part.state_dict(keep_vars=False).items():
            before, mark, name = key.partition(_MARK)
            if mark and (not before or before.endswith(".")):
                found[name] = tensor
    return found


def trunk_state_dict(layers: Iterable[LocalLayer]) -> dict[str, Tensor]:
    """The trunk of a trained network under timm's names, on the CPU: what `model.pretrained: FILE` reads back.

    Heads, layers on top and stages behind the last head are not part of it. Raises ValueError for a network
    without a trunk.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in trunk_tensors(layers).items()}
    if not tensors:
        raise ValueError("this network has no timm backbone: it was made by a job of another kind than transfer")
    return tensors


def save_trunk(layers: Iterable[LocalLayer], path: Path, about: Mapping[str, Any]) -> None:
    """Write `trunk_state_dict` as safetensors with `about` (backbone, run, classes) in its metadata."""
    save_file(trunk_state_dict(layers), path, metadata={k: json.dumps(v) for k, v in about.items()})
