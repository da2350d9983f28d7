"""A whole job whose model is cut among two processes, beside the same in one: `python -m training.cut_job FOLDER STEPS WORDS…`, the words as
accelerate takes them. Of four steps it stops after STEPS and goes on. Every stage but the one that trains is made in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import chatty

ALL = 4


def recipe(root: Path, name: str, steps: int, size: int) -> Any:
    from finebits.recipe import Recipe

    sections = json.loads((root / "r.yaml").read_text())
    sections["training"] |= {"max_steps": steps, "per_device_train_batch_size": size, "save_steps": 2}
    sections["training"] |= {"learning_rate": 0.01, "lr_scheduler_type": "constant"}
    sections["model"]["model_name_or_path"], sections["output_dir"] = str(root / "m"), str(root / name)
    sections["data"] |= {"datasets": [{"path": str(root / "d.jsonl")}], "held_out": {"path": str(root / "d.jsonl")}}
    return Recipe.parse(json.dumps(sections), "cut_job.py")


def main(root: Path, steps: int, words: list[str]) -> None:
    from finebits import job
    from finebits.run.__main__ import make

    own = job.work
    job.work = lambda folder, stage: own(folder, stage) if stage.launch else make(folder, stage)
    job.train(recipe(root, "one", ALL, 4))
    job.train(recipe(root, "two", steps, 2), launch=words)
    if steps < ALL:
        job.train(recipe(root, "two", ALL, 2), launch=words, resume=True)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    chatty.recipe(place)
    main(place, int(sys.argv[2]), sys.argv[3:])
