"""Trunks cut at their stages, against timm's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.errors import JobError
from orchestrator.transfer.backbone import build_trunk, input_form, trunk_shape
from orchestrator.transfer.trunk import NotAChain, chain, find_cuts, split

# Backbone, size of its images here, and the channels or width of each stage.
FAMILIES = {
    "test_resnet": (64, [32, 48, 192, 96]),
    "test_convnext": (64, [24, 32, 48, 64]),
    "test_efficientnet": (64, [24, 32, 48, 256]),
    "test_vit": (64, [64, 64, 64, 64]),
    "test_mambaout": (64, None),
}
every_family = pytest.mark.parametrize("backbone", [name for name in FAMILIES if name in timm.list_models()])


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def of_timm(backbone: str, size: int) -> Any:
    """The same model, built by timm alone."""
    options = {"img_size": size} if "vit" in backbone else {}
    return timm.create_model(backbone, num_classes=0, **options).eval()


@every_family
def test_the_stages_one_after_the_other_are_timms_own_forward_pass(backbone: str) -> None:
    size, widths = FAMILIES[backbone]
    stages = [stage.eval() for stage in build_trunk(backbone, False, size, seed=3)]
    model = of_timm(backbone, size)
    weights = {k.split("trunk.", 1)[1]: v for stage in stages for k, v in stage.state_dict().items()}
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown
    assert all(key.startswith("head.") for key in missing), "only what follows the features may be missing"
    x = images(size)
    with torch.no_grad():
        expected = model.forward_features(x)
        found = []
        for stage in stages:
            x = stage(x)
            found.append(x.shape[1] if x.dim() == 4 else x.shape[2])
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        x = x.permute(0, 2, 3, 1)
    assert torch.equal(x, expected)
    assert widths is None or found == widths


@every_family
def test_what_is_described_is_what_is_built(backbone: str) -> None:
    size, _ = FAMILIES[backbone]
    shape = trunk_shape(backbone, size)
    stages = build_trunk(backbone, False, size, seed=0)
    x = images(size, 1)
    assert tuple(x.shape[1:]) == shape.input
    assert len(shape.stages) == len(stages) == 4
    for described, stage in zip(shape.stages, stages, strict=True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            x = stage.eval()(x)
        assert tuple(x.shape[1:]) == described.output
        assert sum(p.numel() for p in stage.parameters()) == described.parameters
        assert sum(b.numel() for b in stage.buffers()) == described.buffers
        # Attention has other kernels on the CPU than on the meta device; convolutions have the same.
        if "vit" not in backbone:
            assert counter.get_total_flops() == described.flops
    assert sum(s.flops for s in shape.stages) > 0


def test_no_tensor_of_the_model_is_lost_or_held_twice() -> None:
    stages = build_trunk("test_vit", False, 64, seed=0)
    names = [key.split("trunk.", 1)[1] for stage in stages for key in stage.state_dict()]
    assert sorted(names) == sorted(of_timm("test_vit", 64).state_dict())


def test_a_trunk_that_works_on_channels_last_maps_is_cut_too() -> None:
    options: dict[str, Any] = {
        "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "img_size": 56, "num_classes": 0,
        "window_size": 7,
    }  # fmt: skip
    model: Any = timm.create_model("swin_tiny_patch4_window7_224", **options).eval()
    x = images(56)
    with torch.no_grad():
        expected = model.forward_features(x)
    links, called = chain(model, x)
    stages = split(model, find_cuts(links, model.feature_info), called=called)
    with torch.no_grad():
        for stage in stages:
            x = stage(x)
            assert x.shape[2] == x.shape[3], "maps are (B, C, H, W) between stages"
    assert torch.equal(x.permute(0, 2, 3, 1), expected)


def test_weights_depend_on_the_seed_alone() -> None:
    def bits(seed: int) -> Tensor:
        return next(build_trunk("test_resnet", False, 64, seed=seed)[3].parameters())

    assert torch.equal(bits(1), bits(1))
    assert not torch.equal(bits(1), bits(2))


@pytest.mark.parametrize("backbone", ["hrnet_w18_small", "eva02_tiny_patch14_224"])
def test_a_trunk_that_is_no_chain_is_refused_with_families_that_are(backbone: str) -> None:
    with pytest.raises(JobError) as caught:
        trunk_shape(backbone, 224)
    assert str(caught.value) == (
        f"model.backbone: {backbone} cannot be cut into stages: its forward pass is no chain of modules, one fed with "
        "the output of the one before; resnet, convnext, regnet, efficientnet, vit, swin and most other families can"
    )


def test_stages_end_where_strides_end_and_the_stem_belongs_to_the_first() -> None:
    links = ["stem", "a.0", "a.1", "b.0", "c", "norm"]
    info = [{"module": m, "reduction": r} for m, r in (("stem", 2), ("a", 4), ("b", 8), ("c", 16))]
    assert find_cuts(links, info).stages == (("stem", "a.0", "a.1"), ("b.0",), ("c", "norm"))


def test_blocks_of_one_stride_come_in_four_groups() -> None:
    links = ["norm_pre", *(f"blocks.{i}" for i in range(6)), "norm"]
    info = [{"module": f"blocks.{i}", "reduction": 16} for i in range(6)]
    sizes = [len([n for n in names if n.startswith("blocks")]) for names in find_cuts(links, info).stages]
    assert sizes == [2, 1, 2, 1]


def test_a_model_that_does_not_say_where_its_stages_are_is_refused() -> None:
    with pytest.raises(NotAChain, match="does not say where its stages are"):
        find_cuts(["a", "b"], None)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "resnet10t"])
def test_a_backbone_says_how_it_wants_its_images_as_timm_resolves_it(backbone: str) -> None:
    form = input_form(backbone)
    wanted = timm.data.resolve_model_data_config(timm.create_model(backbone, num_classes=0))
    assert (form.image_size, form.mean, form.std) == (wanted["input_size"][1], wanted["mean"], wanted["std"])
    assert (form.crop_share, form.interpolation) == (wanted["crop_pct"], wanted["interpolation"])


def test_a_size_that_a_backbone_does_not_take_is_said() -> None:
    with pytest.raises(JobError, match=r"^model.backbone: test_vit (cannot be built for|does not take) images of 8"):
        trunk_shape("test_vit", 8)
