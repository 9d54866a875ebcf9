"""A trained network as an MLflow model: this file is the model's code, the weights are safetensors beside it.

Nothing is pickled: MLflow stores this module's source and loads it anew, and the network is rebuilt from
model.json and layer_*.safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.data.decode import decode
from orchestrator.run import checkpoint, network


class HffModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Images in, class scores out."""

    def load_context(self, context: Any) -> None:
        """Rebuild the network from the artifact folder `network`."""
        folder = Path(context.artifacts["network"])
        self.description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        d = self.description
        size = d["data"]["image_size"]
        layers = network.build(
            d["model"],
            d["objective"],
            input_shape=(d["data"]["channels"], size, size),
            num_classes=len(d["classes"]),
            seed=0,
            precision=d["precision"],
            per_layer=d["per_layer"],
        )
        for index, layer in enumerate(layers):
            checkpoint.load_layer(folder, index, layer)
        self.network = network.network(d["model"], layers).eval()

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Log-probabilities (N, classes) of uint8 images (N, H, W, C), or of a list of JPEG or PNG files' bytes."""
        data = self.description["data"]
        images = torch.from_numpy(self._pixels(model_input).transpose(0, 3, 1, 2).copy())
        dtype = network.DTYPES[self.description["precision"]]
        shape = (1, data["channels"], 1, 1)
        mean = torch.tensor(data["mean"], dtype=dtype).view(shape) * 255
        scale = 1 / (torch.tensor(data["std"], dtype=dtype).view(shape) * 255)
        with torch.inference_mode():
            votes: torch.Tensor = self.network((images.to(dtype) - mean) * scale)
        return votes.float().numpy()

    def _pixels(self, model_input: Any) -> NDArray[np.uint8]:
        """(N, H, W, C) uint8 of the network's size. Raises ValueError for anything else."""
        data = self.description["data"]
        size, channels = data["image_size"], data["channels"]
        values = getattr(model_input, "values", model_input)
        if isinstance(values, np.ndarray) and values.dtype == object:
            values = values.reshape(-1).tolist()
        if isinstance(values, list) and values and isinstance(values[0], bytes):
            return np.stack([decode(item, image_size=size, channels=channels) for item in values])
        images = np.asarray(values)
        if images.ndim == 3 and channels == 1:
            images = images[..., None]
        if images.ndim != 4 or images.shape[1:] != (size, size, channels) or images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 of shape (N, {size}, {size}, {channels}) or JPEG or PNG bytes, "
                f"got {images.dtype} {images.shape}"
            )
        return images


# MLflow runs this file when a model is logged and loaded; an ordinary import must not set anything.
if not __name__.startswith("orchestrator."):
    mlflow.models.set_model(HffModel())
