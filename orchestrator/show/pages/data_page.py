"""One page about a packed set: how many, how large, how balanced, and what its images look like."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from orchestrator.data.describe import Description, describe, thumbnails
from orchestrator.data.index import Index
from orchestrator.show.pages import html, plots
from orchestrator.storage import write_atomically

_IMAGES = 60
_BARS = 40


def write_page(index: Index, path: Path) -> None:
    """Write the page. Raises DataError when a shard cannot be read."""
    found = describe(index)
    write_atomically(path, data_page(index, found, thumbnails(index, _IMAGES)))


def data_page(index: Index, found: Description, images: Sequence[tuple[str, bytes]]) -> str:
    """The whole document; nothing in it is loaded from elsewhere."""
    name = index.folder.resolve().name
    size = sum(shard.bytes for shard in index.shards)
    numbers = html.numbers(
        {
            "images": f"{found.samples:,}",
            "classes": f"{len(index.classes):,}",
            "shards": f"{len(index.shards):,}",
            "GB": f"{size / 1e9:.2f}",
            "largest class : smallest": f"{found.imbalance:.2f}",
        }
    )
    of = "all images" if found.looked_at == found.samples else f"{found.looked_at} images drawn evenly"
    facts = [("identity", index.sha256), ("packed from", index.source), ("files", _counts(found.suffixes))]
    facts += [("bytes per image", _span(*found.bytes)), (f"modes of {of}", _counts(found.modes))]
    if found.bad:
        facts.append(("cannot be opened", str(found.bad)))
    body = [
        f"<h1>{escape(name)}</h1>",
        numbers,
        html.card("What it holds", html.table(("", ""), facts)),
        '<div class="grid">',
        html.plot_card(f"Longer side in pixels, {of}", _histogram(np.maximum(found.widths, found.heights)), ()),
        html.plot_card(*_balance(index, found), ()),
        "</div>",
        html.card(f"{len(images)} of its images", _sheet(images)),
    ]
    return html.page(name, body)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def _span(low: float, mean: float, high: float) -> str:
    return f"{low:,} to {high:,}, {mean:,.0f} on average"


def _histogram(sides: np.ndarray) -> str:
    """Share of images by size; equal bins, one for each size when there are few."""
    if not len(sides):
        return ""
    values, counts = np.unique(sides, return_counts=True)
    if len(values) <= 12:
        bars = [(str(value), count / len(sides)) for value, count in zip(values, counts, strict=True)]
    else:
        counts, edges = np.histogram(sides, bins=12)
        bars = [(f"{low:.0f}", count / len(sides)) for low, count in zip(edges, counts, strict=False)]
    return plots.bar_plot(bars, label="share of images by longer side")


def _balance(index: Index, found: Description) -> tuple[str, str]:
    """Title and bars: every class, or the smallest and largest ones of many."""
    names = index.class_names
    ordered = sorted(found.per_class.items(), key=lambda item: item[1])
    title = "Share of each class"
    if len(ordered) > _BARS:
        ordered = ordered[: _BARS // 2] + ordered[-_BARS // 2 :]
        title = f"Share of the {_BARS // 2} smallest and the {_BARS // 2} largest classes"
    else:
        ordered = list(found.per_class.items())
    return title, plots.bar_plot(
        [(names.get(c, c), n / found.samples) for c, n in ordered], label="share of each class"
    )


def _sheet(images: Sequence[tuple[str, bytes]]) -> str:
    """A contact sheet: images in the page itself."""
    return html.sheet([(base64.b64encode(data).decode(), [label]) for label, data in images])
