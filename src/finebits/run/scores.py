"""The scores of a model on the held-out rows, in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finebits.evaluate.heldout import Scores
from finebits.files import replaced


def write(path: Path, scores: Scores) -> None:
    """Write the arrays, in one step."""
    with replaced(path) as new, new.open("wb") as f:
        np.savez(f, **{k: v for k, v in vars(scores).items() if v is not None})


def read(path: Path) -> Scores | None:
    """What `write` wrote; None where it is not there."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as archive:
        return Scores(**{k: archive[k] for k in archive.files})
