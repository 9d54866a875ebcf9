"""Pages in a real browser: a headless Chromium that takes pictures and measures. There where the system has one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1280, 375)

# What a person sees without scrolling sideways, what did not load, and letters that are too small to read.
_MEASURE = """<script>window.addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  const name = e => e.tagName + " " + (e.textContent || "").trim().slice(0, 40);
  const all = [...document.querySelectorAll("body *")].filter(e => !e.closest("title,style,script"));
  const scrolls = e => { const s = e.closest(".scroll,pre"); return s && s.scrollWidth > s.clientWidth; };
  const found = {
    width, overflow: document.documentElement.scrollWidth - width,
    outside: all.filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e)).map(name),
    boxes: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth + 1).length,
    broken: [...document.images].filter(i => i.complete && !i.naturalWidth).length, images: document.images.length,
    letters: Math.min(...[...document.querySelectorAll("svg text")].map(t =>
      parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)),
    requests: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).map(r => r.name),
  };
  const pre = document.createElement("pre"); pre.id = "measured"; pre.textContent = JSON.stringify(found);
  document.body.append(pre);
});</script>"""


def browser() -> str | None:
    """The program, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def _call(*words: str, scratch: Path) -> str:
    program = browser()
    assert program is not None
    # Root has no sandbox; the pages are ours.
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    quiet = [
        "--headless",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        f"--user-data-dir={scratch / 'profile'}",
    ]
    offline = [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--disable-background-networking",
        "--allow-file-access-from-files",
    ]
    done = subprocess.run(
        [program, *quiet, *offline, *root, *words], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def _framed(page: Path, width: int, height: int, scratch: Path) -> Path:
    """The page in a frame of that width: a window cannot be as narrow as a phone."""
    frame = scratch / f"frame-{width}.html"
    style = f"border:0;width:{width}px;height:{height}px;display:block"
    frame.write_text(f'<!doctype html><body style="margin:0"><iframe src="{page.as_uri()}" style="{style}"></iframe>')
    return frame


def picture(page: Path, width: int, to: Path, *, height: int = 3000, scratch: Path) -> None:
    """What the page looks like at that width, from its top down."""
    frame = _framed(page, width, height, scratch)
    _call(f"--window-size={max(width, 500)},{height}", f"--screenshot={to}", frame.as_uri(), scratch=scratch)


def measured(page: Path, width: int, scratch: Path) -> dict[str, Any]:
    """Numbers of a page that is `width` wide; see `_MEASURE`."""
    copy = scratch / f"measured-{page.name}"
    copy.write_text(page.read_text().replace("</body>", _MEASURE + "</body>"))
    frame = _framed(copy, width, 3000, scratch)
    wait = '<script>onload=()=>{const d=frames[0].document.getElementById("measured");document.body.append(d)}</script>'
    frame.write_text(frame.read_text() + wait)
    dom = _call("--virtual-time-budget=5000", "--dump-dom", frame.as_uri(), scratch=scratch)
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-2000:]
    values: dict[str, Any] = json.loads(unescape(found.group(1)))
    return values
