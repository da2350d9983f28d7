"""Where no change alone makes a plan fit, two together are offered."""

from pathlib import Path

import pytest

import finebits as fb
from finebits.plan.base import Infeasible

QWEN = Path(__file__).parent.parent / "data" / "configs" / "qwen3-8b"


def test_two_changes_are_offered_where_one_is_not_enough():
    batch = {"max_length": 4096, "per_device_train_batch_size": 4, "dtype": "bfloat16", "device": "cuda", "levers": []}
    with pytest.raises(Infeasible) as caught:
        fb.plan_model(QWEN, "8GiB", fast=True, **batch)
    hint = caught.value.hint
    alone, _, together = hint.partition("Two of them together:")
    assert together and not any(line.rstrip().endswith("fits") for line in alone.splitlines() if "budget.memory" not in line)
    first = together.strip().splitlines()[0]
    words = first.split("saves")[0].split()
    assert len(words) == 2 and "fits" in first
    changed = dict(word.rpartition(".")[2].split("=") for word in words)
    values = {k: v if k == "levers" else int(v) for k, v in changed.items()}
    assert fb.plan_model(QWEN, "8GiB", fast=True, **batch | values).need <= 8 * 2**30
