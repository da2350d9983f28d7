"""Adapters whose paper is where they start: a recipe without a start takes their own, and another is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
from finebits import registry
from finebits.init.base import check_start
from finebits.interop.planning import Settings
from finebits.recipe import Recipe, RecipeError


def recipe(adapter: str) -> Recipe:
    return Recipe.parse(f"model: {{model_name_or_path: m}}\nadapter: {{{adapter}}}\n")


OWN = [
    ("paper: lora", fb.LoftQ()),
    ("paper: loldu", fb.Zeros()),
    ("paper: lora_xs", fb.Zeros()),
    ("paper: gated", fb.Zeros()),
    ("paper: smoothed", fb.SVDQuant()),
    ("paper: slora", fb.Zeros()),
    ("paper: slora, train: core", fb.NLoRA()),
    ("paper: slora, train: left", fb.LaMDA()),
    ("paper: loldu, init: zeros", fb.Zeros()),
    ("paper: lora_xs, init: lora_sb", fb.LoRASB()),
    ("paper: gated, init: kasa", fb.KaSA()),
]


@pytest.mark.parametrize(("adapter", "init"), OWN, ids=[a for a, _ in OWN])
def test_a_recipe_without_a_start_takes_the_adapters_own(adapter: str, init: Any) -> None:
    made = recipe(adapter)
    assert made.init_value() == init
    if "init" not in adapter:
        assert Settings(adapter=made.adapter_value()).init == init


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            "paper: loldu, init: loftq",
            "LoLDU starts from factors of its own, and init loftq gives it others: leave init out, or take zeros",
        ),
        ("paper: lora_xs, init: pissa", "LoRAXS starts from factors of its own"),
        ("paper: lora_xs, inits: [zeros, qera]", "LoRAXS starts from factors of its own"),
        ("paper: lora, init: nlora", "LoRA cannot take init nlora: LoRA has no parameter 'N'"),
        ("paper: lora, init: svdquant", "LoRA cannot take init svdquant: LoRA has no parameter 'lam'"),
    ],
)
def test_a_start_that_it_does_not_admit_is_refused_in_one_sentence(adapter: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(adapter)
    (problem,) = caught.value.problems
    assert said in problem.message and "\n" not in problem.message


def test_a_build_refuses_it_before_anything_is_touched() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="LoLDU starts from factors of its own"):
        fb.build(model, fb.Plan({"0": fb.Spec(adapter=fb.LoLDU(rank=2), init=fb.LoftQ())}))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("name", registry.names("adapters"))
def test_every_adapter_admits_its_own(name: str) -> None:
    adapter = registry.load("adapters", name)()
    check_start(adapter, registry.from_json("init", adapter.own))


@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
def test_what_a_recipe_builds_is_the_paper(shape: tuple[int, int]) -> None:
    """LoLDU's factors are those of the LU decomposition of the held weight, LoRA-XS's its singular vectors, in double precision."""
    W = torch.randn(shape)
    for name in ("loldu", "lora_xs"):
        made = recipe(f"paper: {name}, rank: 5, alpha: 15")
        linear = nn.Linear(shape[1], shape[0], bias=False)
        linear.weight.data = W.clone()
        host = fb.build(nn.Sequential(linear), fb.Plan({"0": fb.Spec(fb.NF(4, 16), fb.RTN(), made.adapter_value(), made.init_value())}))[0]
        p, held = host.p["default"], host.weight.detach().dequantize().double()
        if name == "loldu":
            P, L, U = torch.linalg.lu(held)
            torch.testing.assert_close(p["B"].double(), (P @ L)[:, :5], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(p["A"].double(), (U / U.diagonal()[:, None])[:5], rtol=1e-3, atol=1e-3)
        else:
            U, _, Vh = torch.linalg.svd(held, full_matrices=False)
            torch.testing.assert_close((U[:, :5].mT @ p["B"].double()).abs(), torch.eye(5).double(), rtol=0, atol=1e-3)
            torch.testing.assert_close((Vh[:5] @ p["A"].double().mT).abs(), torch.eye(5).double(), rtol=0, atol=1e-3)
        assert not any(p[k].any() for k in ("z", "R") if k in p)
