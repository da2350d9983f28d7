"""Block sizes from a recipe: the rules of the planner act, and its bound is one of what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import finebits as fb
from finebits.interop.planning import Settings, plan_model
from finebits.plan.knapsack import dual_bound
from finebits.plan.problem import menu_of
from finebits.plan.solve import again

FORMATS = tuple(fb.NF(4, b, "fp32") for b in (16, 32, 64))


def planned(small: Path, **settings: Any) -> fb.Plan:
    return plan_model(small, None, None, Settings(formats=FORMATS, reserve=0.0, dtype="float32", init=fb.Zeros(), **settings))


def blocks(plan: fb.Plan) -> dict[str, int]:
    return {name: s.format.block for name, s in plan.modules.items()}  # type: ignore[union-attr]


def test_the_bound_is_of_the_layers_and_the_share_that_are_left(small: Path) -> None:
    """R6 and R7: what cannot be chosen bounds nothing."""
    free, tight = planned(small, planner=fb.BlockSize()), planned(small, planner=fb.BlockSize(overhead=0.25))
    assert tight.solver["loss"] > free.solver["loss"] and set(blocks(free).values()) == {16}
    assert tight.solver["bound"] > free.solver["bound"] * 1.01 and tight.solver["gap"] < 0.05
    menu = menu_of(tight)
    exact = fb.BlockSize(overhead=0.25, by="exact")(menu, 10**12)
    assert tight.solver["bound"] <= sum(o.loss for o in exact.values()) * (1 + 1e-9)
    assert tight.solver["bound"] == pytest.approx(dual_bound(menu, fb.BlockSize(overhead=0.25).allowed(menu)), rel=1e-6)
    most = max(o.bytes for options in menu.values() for o in options)
    layered = planned(small, planner=fb.BlockSize(layer=most - 1))
    assert layered.solver["loss"] > free.solver["loss"] and layered.solver["bound"] > free.solver["bound"]


def test_blocks_end_with_heads_and_every_layer_says_why(small: Path) -> None:
    """R9 and R12."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(small)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plan, plain = planned(small, planner=fb.BlockSize(overhead=0.25)), planned(small)
    for name, spec in plan.modules.items():
        assert spec.format.unit == (size if name.endswith("o_proj") and size >= 16 else None)  # type: ignore[union-attr]
        assert plain.modules[name].format.unit is None  # type: ignore[union-attr]
    said = plan.solver["blocks"]
    assert said["active"] == "overhead" and said["overhead"] <= 0.25 and {r["module"] for r in said["rows"]} == set(plan.modules)
    assert "blocks" not in plain.solver
    summary = plan.summary()
    assert "the share that is allowed (R6)" in summary and ("with every head of" in summary) == (size >= 16)
    free = planned(small, planner=fb.BlockSize())
    tight = again(free, budget="5.5 bits")
    assert free.solver["blocks"]["active"] is None and tight.solver["blocks"]["active"] == "memory"
