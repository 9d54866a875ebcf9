"""Hyperspherical Forward-Forward: greedy, strictly local training of networks. Needs torch alone.

    import torch
    from hff import GreedyNetwork, HeadOptions, VggOptions, build_layers, make_optimizer

    layers = build_layers(VggOptions(widths=(32, 64)), (1, 8, 8), HeadOptions(num_classes=10), seed=0)
    network = GreedyNetwork(layers)
    optimizers = [make_optimizer(layer, "adamw", lr=1e-3) for layer in layers]
    for images, labels in batches:
        network.train_step(images, labels, optimizers)
    classes = network.eval()(images).argmax(dim=1)

`import hff` and `hff.shapes` do not import torch; the names below do when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hff.architectures import HeadOptions, OwnHead, build_layers
    from hff.audit import LocalityError, LocalityReport, audit_locality
    from hff.exits import calibrate, exit_curve
    from hff.goodness import GoodnessHead, GoodnessLayer, write_labels
    from hff.layers import Frozen, LocalLayer
    from hff.local import LocalUpdate, local_forward_backward, local_update, make_optimizer
    from hff.network import GreedyNetwork
    from hff.objectives import Head, LinearHead, PrototypeHead
    from hff.own_network import Architecture, describe_own
    from hff.randomness import derive_seed
    from hff.schedules import learning_rate
    from hff.shapes import HeadShape, LayerShape, MlpOptions, ResnetOptions, VggOptions, describe
    from hff.similarity import SimilarityTerm, contrastive_losses
    from hff.sphere import margin_loss, normalise, prototype_scores
    from hff.superclasses import cluster
    from hff.votes import fit_vote_weights

_HOME = {
    "Architecture": "own_network",
    "Frozen": "layers",
    "GoodnessHead": "goodness",
    "GoodnessLayer": "goodness",
    "GreedyNetwork": "network",
    "Head": "objectives",
    "HeadOptions": "architectures",
    "HeadShape": "shapes",
    "LayerShape": "shapes",
    "LinearHead": "objectives",
    "LocalLayer": "layers",
    "LocalUpdate": "local",
    "LocalityError": "audit",
    "LocalityReport": "audit",
    "MlpOptions": "shapes",
    "OwnHead": "architectures",
    "PrototypeHead": "objectives",
    "ResnetOptions": "shapes",
    "SimilarityTerm": "similarity",
    "VggOptions": "shapes",
    "audit_locality": "audit",
    "build_layers": "architectures",
    "calibrate": "exits",
    "cluster": "superclasses",
    "contrastive_losses": "similarity",
    "derive_seed": "randomness",
    "describe": "shapes",
    "describe_own": "own_network",
    "exit_curve": "exits",
    "fit_vote_weights": "votes",
    "learning_rate": "schedules",
    "local_forward_backward": "local",
    "local_update": "local",
    "make_optimizer": "local",
    "margin_loss": "sphere",
    "normalise": "sphere",
    "prototype_scores": "sphere",
    "write_labels": "goodness",
}

__all__ = [
    "Architecture",
    "Frozen",
    "GoodnessHead",
    "GoodnessLayer",
    "GreedyNetwork",
    "Head",
    "HeadOptions",
    "HeadShape",
    "LayerShape",
    "LinearHead",
    "LocalLayer",
    "LocalUpdate",
    "LocalityError",
    "LocalityReport",
    "MlpOptions",
    "OwnHead",
    "PrototypeHead",
    "ResnetOptions",
    "SimilarityTerm",
    "VggOptions",
    "audit_locality",
    "build_layers",
    "calibrate",
    "cluster",
    "contrastive_losses",
    "derive_seed",
    "describe",
    "describe_own",
    "exit_curve",
    "fit_vote_weights",
    "learning_rate",
    "local_forward_backward",
    "local_update",
    "make_optimizer",
    "margin_loss",
    "normalise",
    "prototype_scores",
    "write_labels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hff' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hff.{_HOME[name]}"), name)
