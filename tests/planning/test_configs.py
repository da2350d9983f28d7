"""Models of hub size, planned from their config.json alone: every matrix with its shape, the counts of transformers' own models."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
from finebits.interop.linears import linearized
from finebits.interop.planning import Settings, plan_model
from finebits.interop.selecting import targets
from finebits.plan.base import Infeasible, Plan
from finebits.plan.footprint import Footprint
from finebits.plan.seen import Batch

HERE = Path(__file__).parent.parent
CONFIGS = {p.name: p for p in sorted((HERE / "data" / "configs").iterdir())} | {
    "llama-3.1-8b": HERE.parent / "recipes" / "configs" / "llama-3.1-8b"
}
# parameters as published; linears a block, and what stands apart
FACTS: dict[str, tuple[int, int, int]] = {  # parameters, planned matrices, blocks
    "llama-3.1-8b": (8_030_261_248, 7 * 32, 32),
    "llama-3.1-70b": (70_553_706_496, 7 * 80, 80),
    "llama-3.2-3b": (3_212_749_824, 7 * 28, 28),
    "qwen3-4b": (4_022_468_096, 7 * 36, 36),
    "qwen3-8b": (8_190_735_360, 7 * 36, 36),
    "gemma-3-4b": (3_880_263_168, 7 * 34, 34),
    "mixtral-8x7b": (46_702_792_704, (4 + 2 * 8) * 32, 32),
}
TIED = {"llama-3.2-3b", "qwen3-4b", "gemma-3-4b"}


def settings(**more: Any) -> Settings:
    given: dict[str, Any] = dict(device="cuda", dtype="bfloat16", max_length=1024, per_device_train_batch_size=1, init=fb.LoftQ(steps=1))
    return Settings(**given | dict(reserve=0.0, formats=tuple(fb.NF(b, 64, "bf16") for b in (2, 3, 4))) | more)


@functools.cache
def unbounded(name: str) -> Plan:
    return plan_model(CONFIGS[name], None, None, settings(), fast=True)


def test_every_config_has_its_facts() -> None:
    assert FACTS.keys() == CONFIGS.keys()


@pytest.mark.parametrize("name", FACTS)
def test_counts_are_those_of_transformers(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(CONFIGS[name])
    with torch.device("meta"):
        model = linearized(AutoModelForCausalLM.from_config(config))
    model.tie_weights()
    parameters, planned, blocks = FACTS[name]
    own = {k.removesuffix(".weight"): tuple(p.shape) for k, p in model.named_parameters()}
    assert sum(math.prod(s) for s in own.values()) == parameters
    plan = unbounded(name)
    shapes = {k: tuple(c["shape"]) for k, c in plan.costs.items()}
    assert shapes == {k: own[k] for k in shapes} and len(shapes) == planned
    g = Footprint.of(plan).geometry
    assert g.layers == blocks and (g.head == 0) == (name in TIED)
    assert sum(math.prod(s) for s in shapes.values()) + g.embeddings + g.head + g.other == parameters


def test_what_is_particular_of_each() -> None:
    plans = {name: unbounded(name) for name in CONFIGS}
    footprint = {name: Footprint.of(p) for name, p in plans.items()}
    assert plans["llama-3.1-8b"].costs["model.layers.0.self_attn.k_proj"]["shape"] == [1024, 4096]  # grouped queries
    seen = {name: a.geometry.observed.kept(Batch(1, 1024, 0)) / 2**20 / a.geometry.layers for name, a in footprint.items()}
    assert seen["qwen3-8b"] > 36 / 32 * seen["llama-3.1-8b"] * 12288 / 14336  # norms of queries and keys
    mixtral = plans["mixtral-8x7b"]
    assert mixtral.costs["model.layers.0.mlp.experts.gate_up_proj.7"]["shape"] == [28672, 4096]
    assert mixtral.modules["model.layers.0.mlp.experts.gate_up_proj.0"].adapter is not None
    assert footprint["mixtral-8x7b"].geometry.observed.adapted == (4 + 2 * 2) * 32
    assert seen["mixtral-8x7b"] > seen["llama-3.1-8b"] + 2 * 14336 * 1024 * 2 / 2**20  # a token meets two experts
    assert mixtral.costs["model.layers.3.mlp.experts.down_proj.0"]["bytes"] == fb.NF(4, 64, "bf16").storage_bits(4096, 14336) // 8


class Experts(nn.Module):
    """Experts as older models hold them: a list of linears."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(8, 12, bias=False), "w2": nn.Linear(12, 8, bias=False)}) for _ in range(3)
        )


def test_experts_one_by_one_are_matrices_too() -> None:
    with torch.device("meta"):
        found = targets(Experts(), "all-linear")
    assert found == {f"experts.{i}.{w}": s for i in range(3) for w, s in (("w1", (12, 8)), ("w2", (8, 12)))}


def test_a_70b_model_does_not_fit_24_gib_and_is_told_why() -> None:
    with pytest.raises(Infeasible) as caught:
        plan_model(CONFIGS["llama-3.1-70b"], "16GiB", None, settings(per_device_train_batch_size=4, loss_chunk=1024), fast=True)
    said = str(caught.value)
    assert "budget.levers=all" in said and "data.max_length=512" in said and "a smaller base model" in said
    needed = caught.value.smallest
    assert (
        plan_model(CONFIGS["llama-3.1-70b"], needed, None, settings(per_device_train_batch_size=4, loss_chunk=1024), fast=True).peak
        <= needed
    )
