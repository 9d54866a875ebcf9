"""Classify single image files with a run's network, and say how each of its layers voted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.data.images.decode import BadImage
from orchestrator.errors import DataError
from orchestrator.run.inference.classifier import Classifier, pixels
from orchestrator.run.inference.trained import trained_run

_BATCH = 64


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class LayerVote:
    """What one layer alone says: its own first choice, and how likely it finds the network's.

    `weight` is that of its vote; layers of weight 0 are only listened to.
    """

    index: int
    name: str
    weight: float
    choice: Guess
    probability_of_winner: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first, and every layer's vote."""

    image: str
    top: tuple[Guess, ...]
    layers: tuple[LayerVote, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def predict_images(
    run: Path, images: list[Path], top: int, say: Callable[[str], None] = lambda line: None
) -> list[Prediction]:
    """Predictions for JPEG or PNG files, in their order; `say` hears of a run that is not finished.

    Raises DataError naming every file that is no such image, CheckpointError without a checkpoint.
    """
    trained = trained_run(run)
    batch = _read(images, trained.description["data"])
    if trained.unfinished:
        say(trained.unfinished)
    classifier = trained.classifier()
    predictions: list[Prediction] = []
    for start in range(0, len(images), _BATCH):
        part = slice(start, start + _BATCH)
        names = [str(path) for path in images[part]]
        predictions += _classify(classifier, batch[part], names, trained.classes, top)
    return predictions


def _read(images: list[Path], data: dict[str, Any]) -> torch.Tensor:
    arrays, bad = [], []
    for path in images:
        try:
            arrays.append(pixels(path.read_bytes(), data))
        except IsADirectoryError:
            bad.append(f"{path}: is a folder; give the image files in it: {path}/*")
        except OSError as error:
            bad.append(f"{path}: cannot be read: {error.strerror or error}")
        except BadImage as error:
            bad.append(f"{path}: must be a JPEG or PNG image, got: {error}")
    if bad:
        raise DataError("\n".join(bad))
    return torch.from_numpy(np.stack(arrays))


@torch.inference_mode()
def _classify(
    classifier: Classifier, images: torch.Tensor, names: list[str], classes: list[str], top: int
) -> list[Prediction]:
    layers = [score_NK.exp() for score_NK in classifier.layer_scores(images)]
    chance_NK = torch.softmax(classifier(images), dim=1)
    best = chance_NK.topk(min(top, len(classes)), dim=1)
    found = []
    for i, name in enumerate(names):
        guesses = tuple(
            Guess(classes[k], p)
            for k, p in zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True)
        )  # fmt: skip
        winner = int(best.indices[i, 0])
        votes = []
        for index, (layer, weight) in enumerate(zip(classifier.layers(), classifier.network.weights, strict=True)):
            own_K = layers[index][i]
            choice = int(own_K.argmax())
            votes.append(
                LayerVote(index, layer.name, weight, Guess(classes[choice], float(own_K[choice])), float(own_K[winner]))
            )
        found.append(Prediction(name, guesses, tuple(votes)))
    return found
