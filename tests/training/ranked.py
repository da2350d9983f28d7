"""What every rank of the tests of ranks does, one thing after the other, since a rank is mostly imports: `python -m training.ranked FOLDER`. It
trains as it is started, on rows of its own; then whole models in other hands; then cut ones, as under the words of FSDP. The first rank writes
what it found."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

HELD = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 3, "max_grad_norm": 1.0}


WORDS = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]


def under(words: list[str]) -> None:
    """The environment as accelerate's launcher would make it of other words."""
    from accelerate.utils.launch import prepare_multi_gpu_env

    from finebits.interop import launching, sharding

    made = prepare_multi_gpu_env(launching.parsed(words, "cpu"))
    os.environ |= {k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    sharding.taken.cache_clear()


def run(folder: Path, size: int) -> dict[str, object]:
    from finebits.data.tokens import to_batch
    from finebits.objectives.kto import KTO
    from training.small import adapters, rows, trained
    from training.test_objectives import pairs

    found: dict[str, object] = {}
    held = [to_batch(rows(4, seed=9), 0), to_batch(rows(3, seed=8), 0), to_batch(rows(1, seed=7), 0)]
    for name, more in (("plain", {"held": held}), ("kto", {"objective": KTO(), "held": pairs(3), "examples": pairs(8)})):
        events: Path = folder / f"{name}.jsonl"
        engine = trained(folder / name, events=events, per_device_train_batch_size=size, per_device_eval_batch_size=2, **HELD, **more)
        if engine.args.process_index == 0:
            lines = [json.loads(line) for line in events.read_text().splitlines()]
            found[name] = {
                "losses": [e["loss"] for e in lines if e["event"] == "step"],
                "evals": [e["loss"] for e in lines if e["event"] == "eval"],
                "weights": float(sum(p.double().square().sum() for p in adapters(engine).values())),
                "saved": sorted(p.name for p in (folder / name).glob("checkpoint-*")),
            }
    return found


if __name__ == "__main__":
    from training import cut_ranks, plain_ranks

    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    found = {"launched": run(place / "launched", 2), "plain": plain_ranks.found()}
    under(WORDS)
    found["cut"] = {"runs": cut_ranks.run(place / "cut", 2), "gradients": cut_ranks.gradients(), "places": cut_ranks.places()}
    if os.environ["RANK"] == "0":
        (place / "found.json").write_text(json.dumps(found))
