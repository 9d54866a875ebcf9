"""A run folder without training, and its scores computed anew from its files: no module of the product takes part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch.nn import functional as F

from hff.layers import LocalLayer
from hff.local import make_optimizer
from hff.network import GreedyNetwork
from orchestrator.job.load import load_job
from orchestrator.job.resolved import job_to_dict
from orchestrator.run import checkpoint, network
from orchestrator.run.folder import RunFolder
from orchestrator.run.inference.classifier import pixel_statistics

VGG = """\
kind: train
name: made
runs: {runs}
data: {{train: nowhere, image_size: 13, mean: [0.4, 0.5, 0.6], std: [0.2, 0.25, 0.3]}}
model: {{arch: vgg, widths: [6, 8, 10], pool_after: [1], head_grid: 4, vote: [0.25, 0, 2]}}
objective: {{name: hff, prototypes_per_class: 3, sharpness: 7}}
train: {{epochs: 1, global_batch_size: 10, lr: 1e-3, precision: {precision}}}
tracking: {{uri: 'sqlite:///{runs}/mlflow.db'}}
"""
TRANSFER = """\
kind: transfer
name: made
runs: {runs}
data: {{train: nowhere, image_size: 67, mean: [0.4, 0.5, 0.6], std: [0.2, 0.25, 0.3]}}
model: {{backbone: test_resnet, pretrained: false, freeze: all, heads_at: [0, 1, 2, 3], head_grid: 2, vote: equal}}
objective: {{name: hff, prototypes_per_class: 2}}
train: {{epochs: 1, global_batch_size: 10, lr: 1e-3, precision: {precision}}}
"""
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def made_run(
    runs: Path,
    *,
    precision: str = "float32",
    classes: list[str] | None = None,
    text: str = VGG,
    lessons: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None,
) -> Path:
    """RUNS/made with one checkpoint of random weights; batch-norm statistics are not those of a new layer.

    With `lessons`, images (N, H, W, C) and their classes, the weights are those of a few epochs instead.
    """
    folder = RunFolder(runs / "made")
    folder.path.mkdir(parents=True)
    folder.job.write_text(text.format(runs=runs, precision=precision))
    job = job_to_dict(load_job(folder.job))
    names = classes or CLASSES
    folder.classes.write_text(json.dumps(names))
    layers = network.rebuild(network.description(job, names))
    if lessons is None:
        _scramble(layers)
    else:
        _teach(layers, job["data"], *lessons)
    entries = []
    for index, layer in enumerate(layers):
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        entries += checkpoint.save_layer(
            checkpoint.temporary_folder(folder, 7, 1), index, checkpoint.layer_state(layer, optimizer)
        )
    checkpoint.commit(folder, 7, 1, {"step": 7}, entries)
    return folder.path


def _scramble(layers: list[LocalLayer]) -> None:
    """Statistics and norms that are neither those of a new layer nor such that every ReLU is dead."""
    generator = torch.Generator().manual_seed(5)
    for layer in layers:
        for name, tensor in layer.state_dict().items():
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith(("running_mean", "body.1.bias")):
                tensor.copy_(noise * 0.2 - 0.1)
            if name.endswith(("running_var", "body.1.weight")):
                tensor.copy_(noise + 0.5)


def _teach(
    layers: list[LocalLayer], data: dict[str, Any], images: NDArray[np.uint8], labels: NDArray[np.int64]
) -> None:
    mean, scale = pixel_statistics(data, torch.float32)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) - mean) * scale
    target = torch.from_numpy(labels)
    optimizers = [make_optimizer(layer, "adamw", lr=5e-3) for layer in layers]
    for _ in range(4):
        for part in torch.arange(len(target)).split(100):
            GreedyNetwork(layers).train_step(x[part], target[part], optimizers)


def reference_layer_scores(run: Path, images_NHWC: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    """Log-probabilities (N, K) of each layer of a VGG run with prototype heads, in float64 from the formulas."""
    job = job_to_dict(load_job(run / "job.yaml"))
    (weights,) = (run / "checkpoints").iterdir()
    model, objective = job["model"], job["objective"]
    shape = (1, 1, 1, -1)
    x_NHWC = (images_NHWC / 255 - np.reshape(job["data"]["mean"], shape)) / np.reshape(job["data"]["std"], shape)
    x = torch.from_numpy(x_NHWC.transpose(0, 3, 1, 2).copy())
    scores = []
    for index in range(len(model["widths"])):
        t: dict[str, Any] = {
            k: torch.from_numpy(v).double() for k, v in load_file(weights / f"layer_{index:02d}.safetensors").items()
        }
        x = F.conv2d(x, t["body.0.weight"], padding=1)
        mean, var = (t[f"body.1.running_{s}"][None, :, None, None] for s in ("mean", "var"))
        x = (x - mean) / (var + 1e-5).sqrt() * t["body.1.weight"][:, None, None] + t["body.1.bias"][:, None, None]
        x = x.clamp(min=0)
        if index in model["pool_after"]:
            x = F.max_pool2d(x, 2)
        feature = F.adaptive_avg_pool2d(x, min(model["head_grid"], x.shape[2])).flatten(1)
        unit = feature / feature.norm(dim=1, keepdim=True)
        scores.append(_head_score(unit, t, objective))
    return scores


def _head_score(unit_ND: torch.Tensor, t: dict[str, Any], objective: dict[str, Any]) -> NDArray[np.float64]:
    """Log-probabilities (N, K) of a prototype head with the tensors `t`."""
    proto_KMD = t["head.prototypes"] / t["head.prototypes"].norm(dim=2, keepdim=True)
    cos = torch.einsum("nd,kmd->nkm", unit_ND, proto_KMD)
    soft = torch.log(torch.exp(objective["sharpness"] * cos).mean(dim=2)) / objective["sharpness"]
    low, high = objective["scale_min"], objective["scale_max"]
    logit = soft * (low + (high - low) / (1 + torch.exp(-t["head.raw_scale"])))
    found: NDArray[np.float64] = (logit - torch.log(torch.exp(logit).sum(dim=1, keepdim=True))).numpy()
    return found


def reference_transfer_scores(run: Path, trunk: Path, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Equal votes (N, K) of heads on all stages of a timm model whose weights are in the file `trunk`.

    timm itself computes the stages' maps, in float64.
    """
    import timm

    job = job_to_dict(load_job(run / "job.yaml"))
    (weights,) = (run / "checkpoints").iterdir()
    model = timm.create_model(job["model"]["backbone"], features_only=True, out_indices=(1, 2, 3, 4)).double().eval()
    found = {k: torch.from_numpy(v) for k, v in load_file(trunk).items()}
    assert model.load_state_dict(found, strict=False).missing_keys == []
    shape = (1, 1, 1, -1)
    x_NHWC = (images_NHWC / 255 - np.reshape(job["data"]["mean"], shape)) / np.reshape(job["data"]["std"], shape)
    with torch.no_grad():
        maps = model(torch.from_numpy(x_NHWC.transpose(0, 3, 1, 2).copy()))
    scores = []
    for index, y in enumerate(maps):
        feature = F.adaptive_avg_pool2d(y, min(job["model"]["head_grid"], y.shape[2])).flatten(1)
        t = {k: torch.from_numpy(v).double() for k, v in load_file(weights / f"layer_{index:02d}.safetensors").items()}
        scores.append(_head_score(feature / feature.norm(dim=1, keepdim=True), t, job["objective"]))
    total: NDArray[np.float64] = np.mean(scores, axis=0)
    return total


def reference_scores(run: Path, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The weighted vote of the layers, (N, K)."""
    vote = job_to_dict(load_job(run / "job.yaml"))["model"]["vote"]
    layers = reference_layer_scores(run, images_NHWC)
    if vote == "last":
        return layers[-1]
    return sum(w * s for w, s in zip(vote, layers, strict=True))  # type: ignore[return-value]


def noise(count: int, size: int = 13, channels: int = 3, seed: int = 3) -> NDArray[np.uint8]:
    """Images (N, H, W, C) of independent pixels."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
