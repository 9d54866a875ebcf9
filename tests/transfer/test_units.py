"""Units of a transfer job: what they hold, what learns, and that nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hff.architectures import HeadOptions
from hff.audit import audit_locality
from hff.layers import LocalLayer
from hff.local import make_optimizer
from hff.network import GreedyNetwork
from orchestrator.errors import JobError
from orchestrator.job.load import job_from_values
from orchestrator.run.planning import shapes_of
from orchestrator.transfer.units import build_units, plan_units, unit_shapes
from orchestrator.transfer.weights import trunk_state_dict

SIZE, CLASSES = 48, 5
HEADS = {"hff": HeadOptions(num_classes=CLASSES, prototypes_per_class=2), "ce": HeadOptions("linear", CLASSES)}


def model(**changes: Any) -> dict[str, Any]:
    base = {
        "backbone": "test_resnet", "pretrained": False, "freeze": "all", "heads_at": "all", "head_grid": 2,
        "top_widths": [], "top_norm": "batch", "vote": "last",
    }  # fmt: skip
    return base | changes


def units(head: str = "hff", *, end_to_end: bool = False, **changes: Any) -> list[LocalLayer]:
    return build_units(model(**changes), lambda i: HEADS[head], image_size=SIZE, seed=0, end_to_end=end_to_end)


def batch(count: int = 8, size: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % CLASSES


@pytest.mark.parametrize(
    ("heads_at", "tops", "end_to_end", "names"),
    [
        ("all", [], False, ["stage0", "stage1", "stage2", "stage3"]),
        ("last", [], False, ["stage0..stage3"]),
        ([1, 2], [], False, ["stage0..stage1", "stage2"]),
        ([3, 0, 3], [], False, ["stage0", "stage1..stage3"]),
        ([1], [8, 8], False, ["stage0..stage1", "stage2..top0", "top1"]),
        ("last", [8], False, ["stage0..stage3", "top0"]),
        ("all", [8], True, ["stage0..top0"]),
    ],
)
def test_units_end_at_the_heads_and_layers_on_top_follow_the_last_stage(
    heads_at: Any, tops: list[int], end_to_end: bool, names: list[str]
) -> None:
    planned = plan_units(model(heads_at=heads_at, top_widths=tops), 4, end_to_end=end_to_end)
    assert [unit.name for unit in planned] == names


CASES = [
    {},
    {"freeze": "none"},
    {"freeze": 2, "heads_at": [1, 3]},
    {"heads_at": [0], "top_widths": [12, 7]},
    {"heads_at": "last", "freeze": 1, "top_widths": [9], "top_norm": "none"},
    {"backbone": "test_vit", "freeze": 3, "top_widths": [6], "top_norm": "layer"},
]


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("head", HEADS)
def test_what_is_described_is_what_is_built(changes: dict[str, Any], head: str) -> None:
    described = unit_shapes(model(**changes), SIZE, lambda i: HEADS[head].shape, end_to_end=False)
    x, _ = batch(2)
    for stated, layer in zip(described, units(head, **changes), strict=True):
        layer.eval()
        y = layer(x)
        learning = [p for p in layer.body.parameters() if p.requires_grad]
        assert (tuple(x.shape[1:]), tuple(y.shape[1:])) == (stated.input, stated.output)
        assert layer.head(y).shape == (2, CLASSES)
        assert layer.name == stated.name
        assert sum(p.numel() for p in layer.body.parameters()) == stated.parameters
        assert sum(p.numel() for p in layer.head.parameters()) == stated.head_parameters
        assert sum(b.numel() for b in layer.buffers()) == stated.buffers
        frozen = stated.inner.frozen_parameters if stated.inner else 0
        assert sum(p.numel() for p in learning) == stated.parameters - frozen
        x = y


@pytest.mark.parametrize("changes", CASES)
def test_every_loss_reaches_its_own_unit_alone(changes: dict[str, Any]) -> None:
    layers = units(**changes)
    network = GreedyNetwork(layers)
    report = audit_locality(network.train(), *batch())
    for layer, reached in zip(layers, report.reached, strict=True):
        # The scale of a head and every weight that is not frozen: no more, and hardly less (a dead branch).
        assert 0 < reached <= sum(p.numel() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("changes", CASES)
def test_training_leaves_every_frozen_number_as_it_was(changes: dict[str, Any]) -> None:
    layers = units(**changes)
    before = {k: v.clone() for k, v in trunk_state_dict(layers).items()}
    network = GreedyNetwork(layers).train()
    optimizers = [make_optimizer(layer, "adamw", lr=0.1, weight_decay=0.1) for layer in layers]
    for _ in range(3):
        network.train_step(*batch(), optimizers)
    after = trunk_state_dict(layers)
    kept = {k for k in before if torch.equal(before[k], after[k])}
    frozen = changes.get("freeze", "all")
    stages = 4 if frozen == "all" else 0 if frozen == "none" else frozen
    stage_of = _stage_of(changes.get("backbone", "test_resnet"))
    never = {k for k in before if stage_of(k) < stages}
    assert never <= kept, "frozen numbers moved"
    moved = {k for k in before if k.endswith("weight") and stage_of(k) >= stages and before[k].dim() > 1}
    assert not moved & kept, "what is not frozen must learn"
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert all(p.requires_grad for p in group["params"])


def _stage_of(backbone: str) -> Any:
    if backbone == "test_vit":
        ends = (2, 3, 5, 6)
        return lambda k: (
            next(i for i, e in enumerate(ends) if int(k.split(".")[1]) < e)
            if "blocks" in k
            else (3 if k.startswith("norm.") else 0)
        )
    return lambda k: int(k[5]) - 1 if k.startswith("layer") else 0


def test_tokens_are_judged_as_a_map_without_the_class_token() -> None:
    layers = units(backbone="test_vit", heads_at=[0])
    x, _ = batch(2)
    tokens = layers[0].eval()(x)
    assert tokens.shape == (2, 1 + 3 * 3, 64)
    seen = layers[0].head.flat(tokens)
    grid = tokens[:, 1:].reshape(2, 3, 3, 64)
    assert seen.shape == (2, 64 * 2 * 2)
    # Adaptive pooling of 3 to 2 takes rows 0-1 and 1-2.
    expected = torch.stack([grid[:, a : a + 2, b : b + 2].mean(dim=(1, 2)) for a in (0, 1) for b in (0, 1)], dim=2)
    torch.testing.assert_close(seen, expected.flatten(1))


def test_a_unit_built_alone_has_the_bits_of_the_whole() -> None:
    changes: dict[str, Any] = {"freeze": "none", "top_widths": [5]}
    whole = units(**changes)
    alone = build_units(
        model(**changes), lambda i: HEADS["hff"], image_size=SIZE, seed=0, end_to_end=False, only=[2, 4]
    )
    for one, of_whole in zip(alone, (whole[2], whole[4]), strict=True):
        for key, value in of_whole.state_dict().items():
            assert torch.equal(one.state_dict()[key], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads_at": [0, 4]}, "model.heads_at: must number stages of test_resnet from 0 to 3, got 4"),
        ({"freeze": 5}, "model.freeze: must be at most 4, the stages of test_resnet, got 5"),
    ],
)
def test_stages_that_are_not_there_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as caught:
        units(**changes)
    assert str(caught.value) == message


def test_a_plan_counts_the_prototypes_of_each_head() -> None:
    job = job_from_values(
        {
            "kind": "transfer", "name": "x",
            "data": {"train": "digits", "image_size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3},
            "model": {"backbone": "test_resnet", "pretrained": False}, "objective": {"name": "hff"},
            "per_layer": [{"prototypes_per_class": 3}], "features": {"cache": False},
            "train": {"epochs": 1, "global_batch_size": 10, "lr": 1e-3},
        }
    )  # fmt: skip
    shapes = shapes_of(job, CLASSES)
    assert [(s.head_parameters - 1) / s.head_features / CLASSES for s in shapes] == [3, 1, 1, 1]
