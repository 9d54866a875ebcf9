"""The probes of a run, in the terminal and on its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.show.pages import html, plots
from orchestrator.show.terminal import percent

_KINDS = {"top1": "its own head", "probe_raw": "probe of its features", "probe_normalised": "probe of their directions"}


def probes_table(result: Mapping[str, Any]) -> str:
    """One line for each layer."""
    lines = [
        f"  linear probes, fitted on {result['fitted_on']} training images, top-1 on {result['samples']}:",
        f"    {'layer':<16} {'own head':>9} {'features':>9} {'directions':>10} {'scale':>7} {'idle prototypes':>16}",
    ]
    for i, layer in enumerate(result["layers"]):
        scale = "-" if layer.get("scale") is None else f"{layer['scale']:.1f}"
        idle = "-" if layer.get("scale") is None else f"{layer['idle_prototypes']} of {layer['prototypes']}"
        shares = (percent(layer[key]) for key in _KINDS)
        lines.append("    {:<16} {:>9} {:>9} {:>10} {:>7} {:>16}".format(f"{i} {layer['name']}", *shares, scale, idle))
    return "\n".join(lines)


def cards(result: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """What the page shows of the probes: accuracies over depth, a table of the prototypes, their similarities."""
    layers = result["layers"]
    curves = {word: [(float(i), layer[key]) for i, layer in enumerate(layers)] for key, word in _KINDS.items()}
    drawn = plots.line_plot(curves, x_label="layer", y_label="top-1", percent=True)
    title = f"What a linear classifier reads from each layer (fitted on {result['fitted_on']} training images)"
    parts = [html.plot_card(title, drawn, list(curves))]
    rows = [
        (
            f"{i} {layer['name']}",
            f"{layer['scale']:.1f}",
            f"{layer['mean_similarity']:.2f}",
            f"{layer['greatest_similarity']:.2f}",
            f"{layer['idle_prototypes']} of {layer['prototypes']}",
        )
        for i, layer in enumerate(layers)
        if layer.get("scale") is not None
    ]
    if rows:
        head = ("layer", "scale", "mean cosine between classes", "greatest", "prototypes that nobody is nearest to")
        parts.append(html.card("Prototypes", html.table(head, rows)))
    for i, layer in enumerate(layers):
        if layer.get("similarity") is not None:
            drawn = plots.similarity_map(layer["similarity"], classes)
            parts.append(html.plot_card(f"Cosines between the prototypes of layer {i} ({layer['name']})", drawn, []))
        if layer.get("usage") is not None and len(layer["usage"][0]) > 1:
            drawn = plots.usage_map(layer["usage"], classes)
            parts.append(html.plot_card(f"Samples nearest to each prototype of layer {i} ({layer['name']})", drawn, []))
    return parts
