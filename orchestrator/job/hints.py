"""What a user may have meant by a key that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from orchestrator.job.document import Path

# What other tools call it, where no likeness of letters would lead to our word.
SYNONYMS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "gpu": "use_gpu",
    "gpus": "use_gpu",
    "num_workers": "workers",
    "batch_size": "global_batch_size",
}


def near_path(path: Path, known: Collection[Path]) -> str:
    """A hint at the known key path that an unknown one may mean.

    It is the one with the same last word, then the most similar one, then the one whose last word is most similar.
    """
    word = SYNONYMS.get(path[-1], path[-1])
    names = [".".join(p) for p in sorted(known)]
    near = _ending_in(word, path, known) or difflib.get_close_matches(".".join(path), names, n=1)
    if not near and len(path) == 1:
        last = difflib.get_close_matches(word, sorted({p[-1] for p in known}), n=1, cutoff=0.7)
        near = _ending_in(last[0], path, known) if last else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _ending_in(word: str, path: Path, known: Collection[Path]) -> list[str]:
    """Key paths that end in a word: in the same section first, then the shortest."""
    found = [p for p in known if p[-1] == word]
    return [".".join(p) for p in sorted(found, key=lambda p: (p[:-1] != path[:-1], len(p), p))]
