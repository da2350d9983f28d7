"""What a plan says of levers, rows and starts: typed, and in its file as it always was."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

import finebits as fb
from finebits.plan.base import Plan
from finebits.plan.levers import Counted, Levers, Start

WRITTEN: dict[str, Any] = {
    "dtype": "bfloat16",
    "embeddings": "device",
    "compute": "float32",
    "max_length": 256,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": True,
    "loss_chunk": 256,
    "dropout": 0.0,
    "gradient_accumulation_steps": 1,
    "optim": "adamw_torch",
    "device": "cpu",
    "calibration": "sweep",
    "calibration_rows": 20,
    "assistant_only_loss": True,
    "model_revision": None,
    "attn_implementation": "sdpa",
    "notices": ["these are codes"],
    "batches": {"4": {"worst": [[256, 700, 2]], "widths": 2, "calibration": [256, 4000]}},
    "lengths": [[16, 0], [256, 9]],
    "scored": [4, 256, 300],
}


def plan_json() -> dict[str, Any]:
    written = WRITTEN | {"refine": json.loads(json.dumps(Plan({}, start=Start(refine=(fb.LREC(),))).to_json()["levers"]["refine"]))}
    rest = {"model": "m", "model_hash": "h", "seed": 1, "budget": None, "stated": "", "memory": {}, "rows": {}, "host": {}}
    return {"schema": "finebits.plan/1", **rest, "levers": written, "costs": {}, "solver": {}, "sizes": {}, "modules": {}}


def test_a_plan_of_before_is_read_and_hashes_as_it_did() -> None:
    data = plan_json()
    plan = Plan.from_json(data)
    assert plan.levers == Levers("bfloat16", "float32", attn_implementation="sdpa", max_length=256) and plan.levers.inner == 4
    assert plan.counted == Counted(data["levers"]["batches"], data["levers"]["lengths"], [4, 256, 300])
    assert plan.start == Start("sweep", 20, True, (fb.LREC(),)) and plan.notices == ("these are codes",)
    assert plan.to_json() == data and Plan.from_json(plan.to_json()) == plan
    assert plan.hash == hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def test_a_plan_by_hand_says_what_it_means() -> None:
    plan = Plan.from_json({"schema": "finebits.plan/1", "levers": {"dtype": "bfloat16"}, "modules": {}})
    assert plan.levers == Levers(dtype="bfloat16") and plan.counted == Counted() and plan.start == Start()
    with pytest.raises(ValueError, match="levers.micro_batch is nothing that finebits knows"):
        Plan.from_json({"schema": "finebits.plan/1", "levers": {"micro_batch": 1}, "modules": {}})
    with pytest.raises(TypeError, match="levers"):
        Plan({}, levers={"dtype": "bfloat16"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'collect' or 'sweep'"):
        Start("once")
