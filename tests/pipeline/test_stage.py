"""One stage, one step: what a loss that is not finite may touch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hff import HeadOptions, LocalLayer, VggOptions, build_layers, local_forward_backward, local_update
from hff.architectures import make_head
from orchestrator.pipeline.links import Message
from orchestrator.pipeline.stage import NonFiniteLoss, Stage, StageInput
from tests.stages import Passage, lone_stage


def stage() -> Stage:
    layers = build_layers(VggOptions(widths=(4, 4, 6)), (3, 8, 8), HeadOptions(num_classes=3), seed=0)
    return lone_stage(layers, first=2)


def batch(step: int) -> StageInput:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    return StageInput(step, x, torch.tensor([0, 1, 2, 1]))


def parameters(layer: LocalLayer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in layer.parameters()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("poisoned", [0, 1])
def test_a_loss_that_is_not_finite_stops_before_its_update_and_touches_no_other_layer(
    bad: float, poisoned: int
) -> None:
    """A bad input reaches the first layer of the stage; a bad value between two layers reaches the next one."""
    disturbed, sound = stage(), stage()
    for s in (disturbed, sound):
        s.train_step(batch(0))
    before = [parameters(layer) for layer in disturbed.layers]
    disturbed.layers[poisoned].body[0].register_forward_pre_hook(
        lambda _, x: (x[0].index_fill(0, torch.tensor(1), bad),)
    )
    with pytest.raises(NonFiniteLoss, match=f"loss of layer {2 + poisoned} is not finite at step 1") as caught:
        disturbed.train_step(batch(1))
    assert (caught.value.layer, caught.value.step) == (2 + poisoned, 1)
    sound.train_step(batch(1))
    for i, layer in enumerate(disturbed.layers):
        expected = parameters(sound.layers[i]) if i < poisoned else before[i]
        for ours, theirs in zip(parameters(layer), expected, strict=True):
            assert torch.equal(ours, theirs), f"layer {i}"


def test_the_gradient_of_each_layer_is_clipped_by_its_own_length() -> None:
    options, head = VggOptions(widths=(4, 4, 6)), HeadOptions("linear", num_classes=3)
    layers = build_layers(options, (3, 8, 8), head, seed=0)
    plain = [torch.optim.SGD(layer.parameters(), lr=1.0) for layer in layers]
    clipped = lone_stage(layers, optimizers=plain, grad_clip=1e-3)
    before = [parameters(layer) for layer in layers]
    clipped.train_step(batch(0))
    for layer, old in zip(layers, before, strict=True):
        moved = torch.cat([(a - b).ravel() for a, b in zip(parameters(layer), old, strict=True)])
        assert float(moved.double().norm()) == pytest.approx(1e-2 * 1e-3, rel=1e-2), "the rate times the limit"


@pytest.mark.parametrize(("samples", "wanted", "made"), [(3, 3, 1), (4, 8, 2), (4, 1, 1), (7, 3, 3)])
def test_no_micro_batch_has_less_than_two_samples(samples: int, wanted: int, made: int) -> None:
    """One sample alone has no variance for a norm of its own."""
    generator = torch.Generator().manual_seed(0)
    own = StageInput(0, torch.randn(samples, 3, 8, 8, generator=generator), torch.arange(samples) % 3)
    ours, theirs = stage(), stage()
    ours.micro_batches = wanted
    ours.train_step(own)
    local_forward_backward(theirs.layers[0].train(), own.x, own.target, count=samples, micro_batches=made)
    local_update(theirs.layers[0], theirs.optimizers[0])
    for mine, expected in zip(parameters(ours.layers[0]), parameters(theirs.layers[0]), strict=True):
        assert torch.equal(mine, expected)


def test_only_the_layer_of_its_phase_learns_from_what_the_settled_ones_below_put_out() -> None:
    ours, theirs = stage(), stage()
    ours.trained = lambda step: 2 + step
    for phase in range(3):
        came = batch(phase)
        ours.train_step(came)
        x = came.x
        with torch.no_grad():
            for settled in theirs.layers[:phase]:
                x = settled.eval()(x)
        local_forward_backward(theirs.layers[phase].train(), x, came.target, count=4)
        local_update(theirs.layers[phase], theirs.optimizers[phase])
        for i, (layer, expected) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
            for name, value in expected.state_dict().items():
                assert torch.equal(layer.state_dict()[name], value), f"phase {phase}, layer {i}, {name}"


def test_evaluation_adds_the_votes_of_its_layers_to_those_that_came_and_changes_nothing() -> None:
    ours, came = stage(), batch(0)
    before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in ours.layers]
    votes_BC, correct = torch.randn(4, 3), torch.zeros(3, dtype=torch.int64)
    opinions: list[list[torch.Tensor]] = [[], [], []]
    found = ours.evaluate(replace(came, vote=votes_BC), (9.0, 9.0, 0.5, 0.0, 2.0), correct, opinions)
    x, expected, said = came.x, votes_BC, []
    with torch.no_grad():
        for layer, weight in zip(ours.layers, (0.5, 0.0, 2.0), strict=True):
            x = layer.eval()(x)
            said.append(torch.log_softmax(layer.logits(x), dim=1))
            expected = expected + weight * said[-1]
    torch.testing.assert_close(found, expected)
    for own, opinion in zip(opinions, said, strict=True):
        torch.testing.assert_close(own, [opinion])
    assert correct.tolist() == [int((opinion.argmax(dim=1) == came.target).sum()) for opinion in said]
    for layer, state in zip(ours.layers, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_evaluation_in_parts_comes_to_the_same() -> None:
    """And a batch of fewer samples than parts has a part for each."""
    whole, divided, correct = stage(), stage(), torch.zeros(3, dtype=torch.int64)
    for parts in (3, 9):
        divided.micro_batches = parts
        votes = [each.evaluate(batch(0), (0.0, 0.0, 0.5, 1.0, 2.0), correct) for each in (whole, divided)]
        torch.testing.assert_close(votes[1], votes[0])


def test_what_is_handed_on_as_it_came_is_not_sent_from_the_buffer_it_came_in() -> None:
    sent: list[torch.Tensor] = []

    class Keeps:
        waited_s, bytes_total = 0.0, 0

        def send(self, message: Message) -> None:
            sent.append(message.activation)

        def close(self) -> None:
            return

    ours, came = stage(), batch(0)
    ours.sender = Keeps()
    ours._send("train", came, came.x, None, False)
    fresh = came.x * 1
    ours._send("train", came, fresh, None, False)
    assert torch.equal(sent[0], came.x)
    assert sent[0].data_ptr() != came.x.data_ptr()
    assert sent[1].data_ptr() == fresh.data_ptr(), "what is new is not copied"


def two_stages(layers: list[LocalLayer], passage: Passage, **options: object) -> tuple[Stage, Stage]:
    """The same two layers as two stages; the second receives what the first one sent."""
    below, above = (lone_stage([layer], first=i, **options) for i, layer in enumerate(layers))
    below.sender = above.receiver = passage
    return below, above


def own_layers(*bodies: nn.Module) -> list[LocalLayer]:
    torch.manual_seed(0)
    head = HeadOptions(num_classes=3)
    return [LocalLayer(f"body{i}", body, make_head(head, 4 * 4 * 4, 4)) for i, body in enumerate(bodies)]


def many(step: int) -> StageInput:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 1, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    return StageInput(step, x, torch.arange(32) % 3)


def test_a_map_that_comes_in_another_layout_trains_the_same_bits_in_two_stages() -> None:
    def layers() -> list[LocalLayer]:
        torch.manual_seed(0)
        first = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.Unflatten(1, (4, 8, 8)))
        return own_layers(first, nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)))

    assert not layers()[0](many(0).x).is_contiguous(memory_format=torch.channels_last)
    whole = lone_stage(layers())
    below, above = two_stages(layers(), Passage((4, 8, 8)))
    for step in range(4):
        whole.train_step(many(step))
        below.train_step(many(step))
        above.train_step(above.receive())
    for alone, layer in zip(whole.layers, [*below.layers, *above.layers], strict=True):
        for name, value in alone.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), f"{layer.name}, {name}"


class Placed(nn.Module):
    """Under autocast its sum is of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.place = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + self.place
        return y


def test_evaluation_in_bfloat16_hands_on_what_a_link_would_carry() -> None:
    torch.manual_seed(0)
    layers = own_layers(Placed(), nn.Conv2d(4, 4, 3, padding=1))
    half = {"autocast_dtype": torch.bfloat16}
    below, above = two_stages(layers, Passage((4, 8, 8), torch.bfloat16), **half)
    votes, correct = (1.0, 1.0), torch.zeros(2, dtype=torch.int64)
    alone = lone_stage(layers, **half).evaluate(many(0), votes, correct)
    below.evaluate(many(0), votes, correct[:1])
    assert torch.equal(above.evaluate(above.receive(), votes, correct[1:]), alone)


class Reshaped(nn.Module):
    """Cannot take a batch without samples."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.reshape(len(x), -1))
        return y


def test_a_replica_without_samples_evaluates_none_and_hands_on_none() -> None:
    with pytest.raises(RuntimeError):
        Reshaped()(torch.empty(0, 1, 8, 8))
    below, above = two_stages(own_layers(Reshaped(), Reshaped()), Passage((64,)), output_shape=(64,))
    nothing = replace(many(0), x=many(0).x[:0], target=many(0).target[:0], last=True)
    opinions: list[list[Tensor]] = [[]]
    correct = torch.zeros(1, dtype=torch.int64)
    assert below.evaluate(nothing, (0.0, 1.0), correct, opinions).shape == (0, 3)
    came = above.receive()
    assert (came.x.shape, came.last) == ((0, 64), True)
    assert above.evaluate(came, (0.0, 1.0), correct).shape == (0, 3)
    assert [opinion.shape for opinion in opinions[0]] == [(0, 3)]
    assert correct.tolist() == [0]
