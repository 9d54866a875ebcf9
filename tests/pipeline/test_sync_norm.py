"""Batch norms over replicas, with a group of one: the values of torch's and timm's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from hff.layers import Frozen
from orchestrator.errors import EXIT_JOB, JobError
from orchestrator.pipeline.sync_norm import SyncBatchNorm, synchronise_norms


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{Path(store)}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        (nn.BatchNorm2d, (6, 4, 5, 5), {}),
        (BatchNormAct2d, (6, 4, 5, 5), {}),
        (nn.BatchNorm1d, (6, 4), {}),
        (nn.BatchNorm1d, (6, 4, 7), {}),
        (nn.BatchNorm3d, (6, 4, 2, 3, 3), {}),
        (nn.BatchNorm2d, (6, 4, 5, 5), {"affine": False}),
        (nn.BatchNorm2d, (6, 4, 5, 5), {"momentum": None}),
    ],
)
def test_a_replaced_norm_gives_the_values_gradients_and_statistics_of_the_one_before(
    group: dist.ProcessGroup, kind: type[nn.Module], shape: tuple[int, ...], options: dict[str, Any], training: bool
) -> None:
    torch.manual_seed(0)
    own, replaced = nn.Sequential(kind(4, **options)), nn.Sequential(kind(4, **options))
    replaced.load_state_dict(own.state_dict())
    synchronise_norms(replaced, group)
    assert isinstance(replaced[0], SyncBatchNorm)
    for _ in range(3):
        x = torch.randn(shape)
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        for norm, of in ((replaced, ours), (own, theirs)):
            (norm.train(training)(of) ** 3).sum().backward()
        torch.testing.assert_close(replaced(x), own(x))
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert replaced.state_dict().keys() == own.state_dict().keys()
    for key, value in own.state_dict().items():
        torch.testing.assert_close(replaced.state_dict()[key], value)


def test_a_norm_under_two_names_stays_one(group: dist.ProcessGroup) -> None:
    norm = nn.BatchNorm1d(4)
    body = nn.Sequential(norm, nn.ReLU(), norm, nn.Sequential(norm))
    synchronise_norms(body, group)
    assert isinstance(body[0], SyncBatchNorm)
    assert body[2] is body[0] and body[3][0] is body[0]


class Doubled(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), "BatchNorm1d with track_running_stats=False has nothing to"),
        (Doubled(4), "Doubled is a batch norm with a forward of its own, unknown to replicas; use another norm, or "),
    ],
)
def test_a_norm_that_replicas_cannot_share_is_refused(group: dist.ProcessGroup, norm: nn.Module, message: str) -> None:
    with pytest.raises(JobError, match=message) as refusal:
        synchronise_norms(nn.Sequential(norm), group)
    assert refusal.value.exit_code == EXIT_JOB


def test_a_frozen_norm_is_left_alone(group: dist.ProcessGroup) -> None:
    body = nn.Sequential(Frozen(nn.Sequential(nn.BatchNorm2d(3))), nn.BatchNorm2d(3))
    synchronise_norms(body, group)
    assert [type(m).__name__ for m in body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [
        "BatchNorm2d",
        "SyncBatchNorm",
    ]
