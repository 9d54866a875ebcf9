"""Whole networks: what is built is what was described, layers are strictly local, votes are votes."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hff import (
    GreedyNetwork,
    HeadOptions,
    LocalityError,
    LocalUpdate,
    MlpOptions,
    ResnetOptions,
    VggOptions,
    audit_locality,
    build_layers,
    describe,
    local_forward_backward,
    local_update,
    make_optimizer,
)
from hff.layers import LocalLayer
from hff.network import vote_weights
from hff.shapes import Options

ARCHITECTURES: dict[str, tuple[Options, tuple[int, int, int]]] = {
    "mlp": (MlpOptions(widths=(12, 9, 7), norm="layer"), (1, 4, 4)),
    "mlp-without-norm": (MlpOptions(widths=(12, 9), norm="none"), (1, 4, 4)),
    "vgg": (VggOptions(widths=(4, 6, 8), pool_after=(0, 2), head_grid=2), (3, 9, 9)),
    "vgg-strided": (
        VggOptions(widths=(4, 6), first_kernel=7, first_stride=2, norm="group", head_grid=3),
        (3, 16, 16),
    ),
    "resnet": (ResnetOptions(widths=(4, 4, 7), pool_after=(1,), head_grid=2), (3, 9, 9)),
}
HEADS = {
    "hff": HeadOptions("prototype", 5, prototypes_per_class=3, margin=0.1),
    "ce": HeadOptions("linear", 5),
    "aux": HeadOptions("prototype", 5, aux_convs=2),
}
# Hidden convolutions need maps.
PAIRS = [(a, h) for a in ARCHITECTURES for h in HEADS if not (a.startswith("mlp") and h == "aux")]
EVERY_PAIR = pytest.mark.parametrize(("architecture", "head"), PAIRS)
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


def batch(shape: Sequence[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, *shape, generator=generator), torch.randint(5, (6,), generator=generator)


@EVERY_PAIR
@pytest.mark.parametrize("grouping", [{}, {"block_size": 2}, {"end_to_end": True}])
def test_what_is_described_is_what_is_built(architecture: str, head: str, grouping: dict[str, int]) -> None:
    options, shape = ARCHITECTURES[architecture]
    described = describe(options, shape, HEADS[head].shape, **grouping)
    layers = build_layers(options, shape, HEADS[head], seed=0, **grouping)
    x, _ = batch(shape)
    assert len(layers) == len(described)
    for layer, stated in zip(layers, described, strict=True):
        layer.eval()
        assert tuple(x.shape[1:]) == stated.input
        with FlopCounterMode(display=False) as body:
            y = layer(x)
        with FlopCounterMode(display=False) as judged:
            logits = layer.head(y)
        assert tuple(y.shape[1:]) == stated.output
        assert logits.shape == (6, 5)
        assert sum(p.numel() for p in layer.body.parameters()) == stated.parameters
        assert sum(p.numel() for p in layer.head.parameters()) == stated.head_parameters
        assert sum(b.numel() for b in layer.buffers()) == stated.buffers
        assert body.get_total_flops() == 6 * stated.forward_flops
        assert judged.get_total_flops() == 6 * stated.head_flops
        x = y


@EVERY_PAIR
def test_a_step_never_computes_the_gradient_of_its_input(architecture: str, head: str) -> None:
    """The arithmetic of a body is that of its forward pass and of its weights' gradients, nothing more."""
    options, shape = ARCHITECTURES[architecture]
    described = describe(options, shape, HEADS[head].shape)
    x, target = batch(shape)
    for layer, stated in zip(build_layers(options, shape, HEADS[head], seed=0), described, strict=True):
        with FlopCounterMode(display=False) as counted:
            # Even where the layer before would take a gradient.
            update = local_forward_backward(layer, x.requires_grad_(True), target, count=6)
        assert counted.get_total_flops() == 6 * (2 * stated.forward_flops + 3 * stated.head_flops)
        assert x.grad is None
        x = update.output


@EVERY
def test_a_stage_that_builds_its_own_layers_gets_the_bits_of_the_whole(architecture: str) -> None:
    options, shape = ARCHITECTURES[architecture]
    whole = build_layers(options, shape, HEADS["hff"], seed=4)
    torch.manual_seed(99)
    (alone,) = build_layers(options, shape, HEADS["hff"], seed=4, only=[1])
    for name, value in whole[1].state_dict().items():
        assert torch.equal(alone.state_dict()[name], value), name
    state = torch.get_rng_state()
    (other,) = build_layers(options, shape, HEADS["hff"], seed=5, only=[1])
    assert torch.equal(torch.get_rng_state(), state), "torch's own randomness is left as it was"
    assert any(not torch.equal(a, b) for a, b in zip(other.parameters(), alone.parameters(), strict=True))


def test_layers_of_one_shape_begin_with_weights_of_their_own() -> None:
    one, two, three = build_layers(VggOptions(widths=(4, 4, 4)), (4, 8, 8), HEADS["hff"], seed=0)
    for first, second in ((one, two), (two, three)):
        assert not torch.equal(first.body[0].weight, second.body[0].weight)
        assert not torch.equal(first.head.prototypes, second.head.prototypes)


@EVERY
def test_every_architecture_passes_the_locality_audit(architecture: str) -> None:
    options, shape = ARCHITECTURES[architecture]
    network = GreedyNetwork(build_layers(options, shape, HEADS["hff"], seed=0))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    report = audit_locality(network, *batch(shape))
    assert report.reached == tuple(
        sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in network.layers
    )
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items()), "the audit changed the network"


class Leaky(GreedyNetwork):
    """Hands on its output with the history still attached."""

    def hand_on(self, y: torch.Tensor) -> torch.Tensor:
        return y


def test_the_audit_names_the_layers_of_a_missing_detach() -> None:
    options, shape = ARCHITECTURES["vgg"]
    network = Leaky(build_layers(options, shape, HEADS["hff"], seed=0))
    with pytest.raises(LocalityError, match="loss of layer 1 reaches 3 parameters of layer 0"):
        audit_locality(network, *batch(shape))


def test_the_audit_finds_a_shared_parameter() -> None:
    layers = build_layers(MlpOptions(widths=(16, 16)), (1, 4, 4), HEADS["ce"], seed=0)
    layers[1].head = layers[0].head
    with pytest.raises(LocalityError, match="layers 0 and 1 share a parameter"):
        audit_locality(GreedyNetwork(layers), *batch((1, 4, 4)))


def _one_step(layers: list[LocalLayer], x: torch.Tensor, targets: list[torch.Tensor]) -> None:
    for layer, target in zip(layers, targets, strict=True):
        optimizer = make_optimizer(layer, "adamw", lr=1e-2)
        update = local_forward_backward(layer, x, target, count=len(target))
        local_update(layer, optimizer)
        x = update.output


@EVERY
def test_no_parameter_of_a_layer_changes_when_any_other_layer_has_its_targets_shuffled(architecture: str) -> None:
    options, shape = ARCHITECTURES[architecture]
    x, target = batch(shape)
    shuffled = target.roll(1)
    assert not torch.equal(target, shuffled)
    plain = build_layers(options, shape, HEADS["hff"], seed=0)
    depth = len(plain)
    _one_step(plain, x, [target] * depth)
    for j in range(depth):
        disturbed = build_layers(options, shape, HEADS["hff"], seed=0)
        _one_step(disturbed, x, [shuffled if k == j else target for k in range(depth)])
        for k in range(depth):
            pairs = zip(plain[k].parameters(), disturbed[k].parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs) == (k != j), f"layer {k}, targets of layer {j} shuffled"


def test_no_gradient_with_respect_to_a_layers_input_is_computed() -> None:
    (layer,) = build_layers(VggOptions(widths=(4,)), (3, 8, 8), HEADS["hff"], seed=0)
    x, target = batch((3, 8, 8))
    with FlopCounterMode(display=False) as counted:
        local_forward_backward(layer, x.requires_grad_(), target, count=6)
    convolution = 6 * describe(VggOptions(widths=(4,)), (3, 8, 8), HEADS["hff"].shape)[0].forward_flops
    backward = counted.get_flop_counts()["Global"][torch.ops.aten.convolution_backward]
    assert backward == convolution, "the weight gradient costs one forward; an input gradient would add another"
    assert x.grad is None


def test_the_gradient_is_that_of_the_sum_divided_by_the_global_count() -> None:
    x, target = batch((1, 4, 4))
    options = MlpOptions(widths=(7,), norm="layer")
    (one,) = build_layers(options, (1, 4, 4), HEADS["ce"], seed=0)
    (two,) = build_layers(options, (1, 4, 4), HEADS["ce"], seed=0)
    local_forward_backward(one, x, target, count=6)
    for half in (slice(0, 2), slice(2, 6)):
        local_forward_backward(two, x[half], target[half], count=6)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_votes_are_weighted_log_probabilities() -> None:
    options, shape = ARCHITECTURES["vgg"]
    layers = build_layers(options, shape, HEADS["hff"], seed=0)
    x, _ = batch(shape)
    weights = (0.5, 0.0, 2.0)
    network = GreedyNetwork(layers, vote=weights).eval()
    parts = [torch.log_softmax(logits, dim=1) for logits in network.layer_logits(x)]
    torch.testing.assert_close(network(x), sum(w * p for w, p in zip(weights, parts, strict=True)))
    last = GreedyNetwork(layers).eval()
    assert torch.equal(last(x).argmax(1), network.layer_logits(x)[-1].argmax(1))
    with pytest.raises(ValueError, match="3 weights"):
        vote_weights([1.0, 2.0], 3)


def test_heads_without_a_vote_are_not_computed() -> None:
    """Hidden convolutions would cost as much as the layers; they are dropped with their head."""
    options, shape = ARCHITECTURES["vgg"]
    described = describe(options, shape, HEADS["aux"].shape)
    network = GreedyNetwork(build_layers(options, shape, HEADS["aux"], seed=0)).eval()
    with FlopCounterMode(display=False) as counted:
        network(batch(shape)[0])
    bodies = sum(stated.forward_flops for stated in described)
    assert counted.get_total_flops() == 6 * (bodies + described[-1].head_flops)


def test_a_shortcut_adds_the_input_and_zeros_for_missing_channels_before_the_relu() -> None:
    options, shape = ARCHITECTURES["resnet"]
    layers = build_layers(options, shape, HEADS["hff"], seed=0)
    x = torch.rand(6, 4, 9, 9)
    for layer, missing in ((layers[1], 0), (layers[2], 3)):
        layer.eval()
        weight = dict(layer.body.named_parameters())["0.inner.0.weight"]
        # A fresh batch norm in evaluation divides by sqrt(1 + eps).
        inner = torch.nn.functional.conv2d(x, weight, padding=1) / (1 + 1e-5) ** 0.5
        whole = inner + torch.cat([x, torch.zeros(6, missing, 9, 9)], dim=1)
        expected = whole.relu() if missing else torch.nn.functional.max_pool2d(whole.relu(), 2)
        torch.testing.assert_close(layer(x), expected)


def test_weight_decay_spares_norms_biases_scales_and_prototypes() -> None:
    (layer,) = build_layers(VggOptions(widths=(4,)), (3, 8, 8), HEADS["hff"], seed=0)
    optimizer = make_optimizer(layer, "sgd", lr=0.1, weight_decay=0.5)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    names = {n for n, p in layer.named_parameters() if id(p) in decayed}
    assert names == {"body.0.weight"}
    (linear,) = build_layers(MlpOptions(widths=(4,), norm="layer"), (3, 8, 8), HEADS["ce"], seed=0)
    optimizer = make_optimizer(linear, "adamw", lr=0.1, weight_decay=0.5, betas=(0.5, 0.7))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    assert {n for n, p in linear.named_parameters() if id(p) in decayed} == {"body.1.weight", "head.linear.weight"}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.7)}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimizer_makes_the_updates_of_torchs_own_without_importing_its_compiler(name: str) -> None:
    """In a process of its own, because other tests may have imported the compiler."""
    code = f"""
import sys, torch
from hff import HeadOptions, VggOptions, build_layers, local_forward_backward, local_update, make_optimizer
ours, theirs = (build_layers(VggOptions(widths=(4,)), (3, 8, 8), HeadOptions(num_classes=3), seed=0)[0] for _ in "ab")
optimizer = make_optimizer(ours, {name!r}, lr=0.1, weight_decay=0.5, momentum=0.8)
batches = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])) for _ in range(3)]
for x, target in batches:
    local_forward_backward(ours, x, target, count=4)
    local_update(ours, optimizer)
assert "torch._dynamo" not in sys.modules
named = dict(theirs.named_parameters())
groups = [{{"params": [named["body.0.weight"]], "weight_decay": 0.5}},
          {{"params": [p for n, p in named.items() if n != "body.0.weight" and p.requires_grad]}}]
reference = {{"adamw": lambda: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0, fused=True),
             "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.8, fused=True)}}[{name!r}]()
for x, target in batches:
    local_forward_backward(theirs, x, target, count=4)
    reference.step()
    reference.zero_grad()
    theirs.head.constrain_()
assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
assert all(p.grad is None for p in ours.parameters())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_greedy_network_learns_a_separable_task() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(200) % 5
    x = torch.randn(200, 1, 4, 4, generator=generator) * 0.3
    x[torch.arange(200), 0, 0, target % 4] += 2.0 * (target < 4)
    layers = build_layers(MlpOptions(widths=(32, 32)), (1, 4, 4), HEADS["hff"], seed=0)
    network, optimizers = GreedyNetwork(layers), [make_optimizer(layer, "adamw", lr=1e-2) for layer in layers]
    for _ in range(40):
        network.train_step(x, target, optimizers)
    assert (network.eval()(x).argmax(1) == target).float().mean() > 0.97


def test_impossible_shapes_are_refused_with_the_layer() -> None:
    with pytest.raises(ValueError, match="pooled to nothing after layer 2"):
        describe(VggOptions(widths=(4, 4, 4), pool_after=(0, 1, 2)), (1, 4, 4), HEADS["ce"].shape)
    with pytest.raises(ValueError, match="from 0 to 1, got 5"):
        describe(VggOptions(widths=(4, 4), pool_after=(5,)), (1, 8, 8), HEADS["ce"].shape)
    with pytest.raises(ValueError, match=r"must not fall, got \[4, 8, 6\]"):
        describe(ResnetOptions(widths=(4, 8, 6)), (1, 8, 8), HEADS["ce"].shape)
    with pytest.raises(ValueError, match="aux_convs need maps"):
        describe(MlpOptions(widths=(4,)), (1, 8, 8), HEADS["aux"].shape)


def test_importing_hff_and_its_shapes_does_not_import_torch() -> None:
    code = "import sys, hff, hff.shapes, hff.schedules, hff.randomness; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_updates_are_those_of_torchs_plain_loop_whatever_the_memory_layout(name: str) -> None:
    options, shape = ARCHITECTURES["vgg"]
    layer = build_layers(options, shape, HEADS["hff"], seed=0)[0].to(memory_format=torch.channels_last)
    plain = copy.deepcopy(layer)
    ours = make_optimizer(layer, name, lr=0.1)
    reference = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name](
        plain.parameters(), lr=0.1, weight_decay=0.0, foreach=False, **({"momentum": 0.9} if name == "sgd" else {})
    )
    x, target = batch(shape)
    x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        for unit, optimizer in ((layer, ours), (plain, reference)):
            local_forward_backward(unit, x, target, count=6)
            optimizer.step()
            optimizer.zero_grad()
    for (key, mine), theirs in zip(layer.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=key)


def test_what_a_step_gives_back_is_shown_on_a_line_without_its_output() -> None:
    shown = repr(LocalUpdate(torch.zeros(50, 1000), torch.tensor(2.5), torch.tensor(7)))
    assert shown == "LocalUpdate(loss_sum=tensor(2.5000), correct=tensor(7))"
