"""What one layer has of its own: `per_layer` over `train` and `objective`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def of_layer(section: Mapping[str, Any], per_layer: Sequence[Mapping[str, Any] | None], layer: int) -> dict[str, Any]:
    """The resolved `train` or `objective` section as layer `layer` sees it: its own entry first."""
    entry = per_layer[layer] if layer < len(per_layer) else None
    own = {key: value for key, value in (entry or {}).items() if value is not None and key in section}
    return {**section, **own}
