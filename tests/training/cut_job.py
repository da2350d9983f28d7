"""A whole job whose model is cut among two processes, gone on with, beside the same in one: `python -m training.cut_job FOLDER WORDS…`, the
words as accelerate takes them. Every stage but the one that trains is made in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import chatty


def recipe(root: Path, name: str, steps: int, size: int) -> Any:
    from finebits.recipe import Recipe

    sections = json.loads((root / "r.yaml").read_text())
    sections["training"] |= {"max_steps": steps, "per_device_train_batch_size": size, "save_steps": 2, "learning_rate": 0.01}
    sections["model"]["model_name_or_path"], sections["output_dir"] = str(root / "m"), str(root / name)
    sections["data"] |= {"datasets": [{"path": str(root / "d.jsonl")}], "held_out": {"path": str(root / "d.jsonl")}}
    return Recipe.parse(json.dumps(sections), "cut_job.py")


def main(root: Path, words: list[str]) -> None:
    from finebits import job
    from finebits.run.__main__ import make

    own = job.work
    job.work = lambda folder, stage: own(folder, stage) if stage.launch else make(folder, stage)
    job.train(recipe(root, "one", 4, 4))
    job.train(recipe(root, "two", 2, 2), launch=words)
    job.train(recipe(root, "two", 4, 2), launch=words, resume=True)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    chatty.recipe(place)
    main(place, sys.argv[2:])
