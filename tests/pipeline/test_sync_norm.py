"""Batch norms over replicas, with a group of one: the values of torch's and timm's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from hff.layers import Frozen
from orchestrator.pipeline.sync_norm import SyncBatchNorm, synchronise_norms


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{Path(store)}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_a_replaced_norm_gives_the_values_and_statistics_of_the_one_before(
    group: dist.ProcessGroup, kind: type[nn.Module], training: bool
) -> None:
    torch.manual_seed(0)
    own, replaced = nn.Sequential(kind(4)), nn.Sequential(kind(4))
    replaced.load_state_dict(own.state_dict())
    synchronise_norms(replaced, group)
    assert isinstance(replaced[0], SyncBatchNorm)
    x = torch.randn(6, 4, 5, 5)
    torch.testing.assert_close(replaced.train(training)(x), own.train(training)(x))
    assert replaced.state_dict().keys() == own.state_dict().keys()
    for key, value in own.state_dict().items():
        torch.testing.assert_close(replaced.state_dict()[key], value)


def test_a_frozen_norm_is_left_alone(group: dist.ProcessGroup) -> None:
    body = nn.Sequential(Frozen(nn.Sequential(nn.BatchNorm2d(3))), nn.BatchNorm2d(3))
    synchronise_norms(body, group)
    assert [type(m).__name__ for m in body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [
        "BatchNorm2d",
        "SyncBatchNorm",
    ]
