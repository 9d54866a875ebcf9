"""A trained network as an MLflow model: this file is the model's code, the weights are safetensors beside it.

Nothing is pickled: MLflow stores this module's source and loads it anew, and the network is rebuilt from
model.json and layer_*.safetensors.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.data.images.decode import BadImage
from orchestrator.run.inference.classifier import pixels
from orchestrator.run.inference.trained import load_classifier


class HffModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Images in, class scores out."""

    def load_context(self, context: Any) -> None:
        """Rebuild the network from the artifact folder `network`."""
        folder = Path(context.artifacts["network"])
        self.description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.classifier = load_classifier(self.description, folder)

    # A bare array: of any narrower type MLflow would make the signature, of none it would warn.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> NDArray[np.float32]:
        """Scores (N, classes), whose argmax is the class that `orchestrator eval` gives.

        Takes whole numbers of 0 to 255 of shape (N, H, W, C) in the network's own size, or JPEG or PNG files: their
        bytes, or base64 text of them as JSON carries it, as a list, an array or the only column of a table.
        Raises ValueError for anything else, with the position of a file that is none.
        """
        with torch.inference_mode():
            scores: torch.Tensor = self.classifier(torch.from_numpy(self._images(model_input)))
        return scores.numpy()

    def _images(self, model_input: Any) -> NDArray[np.uint8]:
        """(N, H, W, C) uint8 of the network's size."""
        values = np.asarray(getattr(model_input, "values", model_input))
        if values.dtype.kind in "OSU" and values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim == 1 and values.dtype.kind in "OSU":
            return np.stack([self._decoded(i, item) for i, item in enumerate(values.tolist())])
        return self._checked(values)

    def _decoded(self, position: int, item: Any) -> NDArray[np.uint8]:
        try:
            content = base64.b64decode(item, validate=False) if isinstance(item, str) else bytes(item)
            return pixels(content, self.description["data"])
        except (BadImage, binascii.Error, TypeError, ValueError) as error:
            raise ValueError(f"image {position}: {error}") from error

    def _checked(self, images: NDArray[Any]) -> NDArray[np.uint8]:
        """Arrays as they are, or as JSON brought them: whole numbers without their type."""
        data = self.description["data"]
        size, channels = data["image_size"], data["channels"]
        if images.ndim == 3 and channels == 1:
            images = images[..., None]
        if images.dtype == object:
            images = np.array(images.tolist())
        fits = images.ndim == 4 and images.shape[1:] == (size, size, channels) and images.dtype.kind in "iu"
        if not fits or (images.size and (images.min() < 0 or images.max() > 255)):
            raise ValueError(
                f"images must be uint8 of shape (N, {size}, {size}, {channels}) or JPEG or PNG bytes, "
                f"got {images.dtype} {images.shape}"
            )
        return np.ascontiguousarray(images, dtype=np.uint8)


# MLflow runs this file when a model is logged and loaded; an ordinary import must not set anything.
if not __name__.startswith("orchestrator."):
    mlflow.models.set_model(HffModel())
