"""A tiny federation in a folder: rows of four kinds, a tiny model in 4 bits, a recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny_llama as tiny
from finebits.recipe import Recipe

RECIPE = """
model: {{model_name_or_path: {place}/model, dtype: float32}}
budget: {{memory: 5 bits}}
data: {{datasets: [{{path: {place}/train.jsonl}}], held_out: {{path: {place}/held.jsonl}}, max_length: 32}}
quantization: {{candidates: [nf4-b64]}}
adapter: {{paper: lora, rank: 4, alpha: 8, init: zeros}}
training: {{max_steps: 2, learning_rate: 5.0e-3, per_device_train_batch_size: 4, gradient_checkpointing: false}}
output_dir: {place}/out
"""


def recipe(place: Path, **more: Any) -> Recipe:
    tiny.worded(place / "model")
    draw = random.Random(0)
    row = lambda k: {"text": " ".join(f"w{5 + 20 * k + draw.randrange(20)}" for _ in range(8)), "label": "abcd"[k]}  # noqa: E731
    for name, count in (("train", 40), ("held", 24)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row(i % 4)) + "\n" for i in range(count)))
    return Recipe.parse(RECIPE.format(place=place), overrides=[f"{k}={v}" for k, v in more.items()])
