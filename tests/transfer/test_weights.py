"""Weights from and to files under timm's names: what fits is loaded, what does not is named key by key."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hff.architectures import HeadOptions
from orchestrator.errors import CheckpointError
from orchestrator.transfer.backbone import build_trunk, check_weights
from orchestrator.transfer.units import build_units
from orchestrator.transfer.weights import save_trunk, trunk_state_dict

SIZE = 64


def whole_model(backbone: str = "test_resnet", **options: Any) -> dict[str, Tensor]:
    """Tensors of timm's complete model, its classifier included, of another seed than any trunk here."""
    torch.manual_seed(99)
    return {k: v.clone() for k, v in timm.create_model(backbone, **options).state_dict().items()}


def loaded(path: Path, backbone: str = "test_resnet", size: int = SIZE) -> dict[str, Tensor]:
    stages = build_trunk(backbone, str(path), size, seed=0)
    return {k.split("trunk.", 1)[1]: v for stage in stages for k, v in stage.state_dict().items()}


def refused(path: Path, backbone: str = "test_resnet") -> str:
    with pytest.raises(CheckpointError) as caught:
        check_weights(backbone, str(path), SIZE)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_a_complete_model_is_taken_without_its_classifier_and_said(tmp_path: Path) -> None:
    tensors, path = whole_model(), tmp_path / "w.safetensors"
    save_file(tensors, path)
    found = loaded(path)
    assert all(torch.equal(found[k], tensors[k]) for k in found)
    assert set(tensors) - set(found) == {"fc.weight", "fc.bias"}
    line = check_weights("test_resnet", str(path), SIZE)
    assert line == f"{path}: {len(found)} tensors of test_resnet; left out: fc.bias, fc.weight"


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_torch_file_is_read_as_training_loops_write_it(tmp_path: Path, wrapper: str | None) -> None:
    tensors, path = whole_model(), tmp_path / "w.pth"
    parallel = {f"module.{k}": v for k, v in tensors.items()} if wrapper else tensors
    torch.save({wrapper: parallel, "epoch": 3} if wrapper else parallel, path)
    found = loaded(path)
    assert all(torch.equal(found[k], tensors[k]) for k in found)


def test_position_embeddings_of_another_image_size_are_resized_by_timm(tmp_path: Path) -> None:
    tensors, path = whole_model("test_vit"), tmp_path / "w.safetensors"
    save_file(tensors, path)
    found = loaded(path, "test_vit", 64)
    assert tensors["pos_embed"].shape[1] == 1 + 10 * 10
    assert found["pos_embed"].shape[1] == 1 + 4 * 4
    resized = timm.layers.resample_abs_pos_embed(tensors["pos_embed"], new_size=[4, 4], num_prefix_tokens=1)
    assert torch.equal(found["pos_embed"], resized)


def test_a_trained_trunk_written_under_timms_names_is_read_back_and_by_timm(tmp_path: Path) -> None:
    model = {
        "backbone": "test_resnet", "pretrained": False, "freeze": 1, "heads_at": [1, 3], "head_grid": 2,
        "top_widths": [8], "top_norm": "batch",
    }  # fmt: skip
    heads = HeadOptions(num_classes=3)
    layers = build_units(model, lambda i: heads, image_size=SIZE, seed=5, end_to_end=False)
    path = tmp_path / "trunk.safetensors"
    save_trunk(layers, path, {"backbone": "test_resnet"})
    written = load_file(path)
    found = loaded(path)
    assert found.keys() == written.keys()
    assert all(torch.equal(found[k], written[k]) for k in found)
    by_timm = timm.create_model("test_resnet", num_classes=0)
    by_timm.load_state_dict(written)
    assert torch.equal(by_timm.state_dict()["layer3.0.conv2.weight"], trunk_state_dict(layers)["layer3.0.conv2.weight"])


def test_every_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors, path = whole_model(), tmp_path / "w.safetensors"
    del tensors["layer1.0.bn1.bias"]
    tensors["layer9.weight"] = torch.zeros(1)
    tensors["conv1.0.weight"] = torch.zeros(16, 1, 3, 3)
    save_file(tensors, path)
    assert refused(path) == (
        f"model.pretrained: {path}: does not fit test_resnet (90 tensors, the file has 92):\n"
        "  1 missing: layer1.0.bn1.bias\n"
        "  1 unknown: layer9.weight\n"
        "  1 of another shape: conv1.0.weight is (16, 1, 3, 3), must be (16, 3, 3, 3)\n"
        "Give the weights of test_resnet, or name the backbone that they belong to."
    )


def test_the_weights_of_another_backbone_are_refused_with_some_of_many_keys(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(whole_model("test_vit"), path)
    message = refused(path)
    counted = sum(not k.endswith("num_batches_tracked") for k in whole_model() if not k.startswith("fc"))
    assert f"  {counted} missing: conv1.0.weight, " in message
    assert f" and {counted - 5} more\n" in message
    assert "unknown: blocks.0." in message or "unknown: cls_token" in message


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    assert refused(path) == f"model.pretrained: {path}: no such file"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_damaged_file_is_said(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04 no weights at all")
    assert refused(path).startswith(f"model.pretrained: {path}: ")


class Bomb:
    """What an attacker would put beside the tensors."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/never-made-by-weights"),))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"state_dict": {}, "extra": Bomb()}, path, pickle_module=pickle)
    message = refused(path)
    assert message.startswith(f"model.pretrained: {path}: holds more than tensors, and is not loaded: ")
    assert not Path("/tmp/never-made-by-weights").exists()


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save([torch.zeros(2)], path)
    assert refused(path) == f"model.pretrained: {path}: must hold tensors by name, got a list"
