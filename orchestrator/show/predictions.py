"""`orchestrator predict`: the likeliest classes of each image and how every layer voted."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from orchestrator.errors import EXIT_DONE
from orchestrator.run.folder import write_atomically
from orchestrator.run.inference.predict import Prediction, predict_images
from orchestrator.show.terminal import as_text, percent


def predict_command(run: Path, images: Sequence[Path], top: int, json_path: Path | None) -> int:
    """Show the predictions, and write them as JSON (to standard output alone for `-`)."""
    predictions = predict_images(run, list(images), top, lambda line: print(line, file=sys.stderr))
    text = json.dumps([p.to_json() for p in predictions], indent=1)
    if str(json_path) == "-":
        print(text)
        return EXIT_DONE
    print("\n\n".join(prediction_text(p) for p in predictions))
    if json_path is not None:
        write_atomically(json_path, text + "\n")
    return EXIT_DONE


def prediction_text(prediction: Prediction) -> str:
    """Two small tables: the classes, and the layers with their own choice and what they think of the winner."""
    winner = prediction.top[0].label
    classes = Table(box=None, pad_edge=False, show_header=False)
    for guess in prediction.top:
        classes.add_row(guess.label, percent(guess.probability))
    layers = Table(box=None, pad_edge=False)
    for column in ("layer", "name", "weight", "its own choice", "", f"for {winner}"):
        layers.add_column(column, justify="left" if column in ("name", "its own choice") else "right")
    for vote in prediction.layers:
        layers.add_row(
            str(vote.index),
            vote.name,
            f"{vote.weight:.3g}",
            vote.choice.label,
            percent(vote.choice.probability),
            percent(vote.probability_of_winner),
        )
    return f"{prediction.image}\n{as_text(classes)}\n\n{as_text(layers)}"
