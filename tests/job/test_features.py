"""When a frozen backbone's outputs are kept, and which jobs are refused because they cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import EXIT_JOB, JobError
from orchestrator.job.network import cached_features

TEXT = """\
kind: transfer
name: sample
data: {train: data/shards}
model: {backbone: resnet18, pretrained: false}
objective: {name: hff}
train: {epochs: 4, global_batch_size: 100, lr: 1e-3}
"""


def test_only_the_outputs_of_a_wholly_frozen_backbone_are_kept(load: Any, text: str) -> None:
    features = cached_features(load(content=TEXT))
    assert features is not None
    assert (features.views, features.dtype) == (1, "float16")
    for override in ("model.freeze=none", "model.freeze=2", "features.cache=false"):
        assert cached_features(load(override, content=TEXT)) is None
    assert cached_features(load(content=text)) is None


@pytest.mark.parametrize(
    "augment", ["flip=true", "crop_padding=4", "cutout=8", "resized_crop=[0.2, 1.0]"], ids=lambda a: a.split("=")[0]
)
def test_random_augmentation_wants_several_views_of_each_image(load: Any, augment: str) -> None:
    with pytest.raises(JobError) as caught:
        load(f"data.augment.{augment}", content=TEXT)
    assert caught.value.exit_code == EXIT_JOB
    assert str(caught.value).endswith(
        "features.views: must be at least 2 with random data.augment, which changes what the frozen backbone "
        "computes (that many versions of each image are kept; or set features.cache to false), got 1"
    )
    for remedy in ("features.views=2", "features.cache=false", "model.freeze=none"):
        load(f"data.augment.{augment}", remedy, content=TEXT)


def test_views_without_augmentation_are_refused(load: Any) -> None:
    with pytest.raises(JobError, match=r"features.views: must be 1 without data.augment \(all .* the same\), got 4"):
        load("features.views=4", content=TEXT)
    load("features.views=4", "features.cache=false", content=TEXT)
