"""Ranks that are given out before bits are chosen: against ranks found from recorded inputs, in plans, in memory, and from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
from finebits import registry
from finebits.interop.hf import load_planned
from finebits.interop.planning import Settings, plan_model
from finebits.interop.selecting import Mistake
from finebits.plan.base import Plan
from finebits.plan.solve import again
from finebits.recipe import Recipe, RecipeError
from finebits.recipe.rows import rows_of
from finebits.run.plans import priced
from tiny_llama import names

ROWS = [{"text": " ".join(f"w{(i * j * j) % 120 + 1}" for j in range(14))} for i in range(1, 9)]
RANK, COUNT = 4, 5


def settings(**more: Any) -> Settings:
    given: dict[str, Any] = dict(formats=(fb.NF(2, 32), fb.NF(4, 32)), adapter=fb.LoRA(RANK, 8.0), init=fb.EVA(), max_length=64)
    return Settings(**given | dict(calibration_rows=COUNT, reserve=0.0, dtype="float32", ranking=fb.EVARanks(rho=2.0)) | more)


def wanted(folder: Path, rho: float) -> dict[str, int]:
    """Inputs of every linear of the model as transformers runs it, their singular values in double precision, and the largest shares of all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs: dict[str, list[torch.Tensor]] = {n: [] for n in names()}
    for n in names():
        model.get_submodule(n).register_forward_hook(lambda m, x, y, n=n: inputs[n].append(x[0][0].detach().double()))
    for row in ROWS[:COUNT]:
        ids = tokenizer(row["text"])["input_ids"]
        model(input_ids=torch.tensor([[*ids, *([] if ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id])]]))
    shares = {}
    for n, X in inputs.items():
        energy = torch.linalg.svdvals(torch.cat(X)).square()
        shares[n] = (energy / energy.sum()).tolist()[: round(rho * RANK)]
    pool = sorted(((x, n) for n, s in shares.items() for x in s), reverse=True)[: RANK * len(shares)]
    return {n: sum(owner == n for _, owner in pool) for n in shares}


def ranks(plan: Plan) -> dict[str, int]:
    return {n: 0 if s.adapter is None else s.adapter.rank for n, s in plan.modules.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("rho", [2.0, 4.0])
def test_ranks_go_where_the_inputs_of_the_rows_vary(small: Path, rho: float) -> None:
    made = plan_model(small, None, ROWS, settings(ranking=fb.EVARanks(rho=rho)))
    found = ranks(made)
    assert found == wanted(small, rho) and sum(found.values()) == RANK * 14 and len(set(found.values())) > 2
    assert {s.adapter.s for s in made.modules.values() if s.adapter} == {2.0}  # alpha moves with the rank


def test_memory_is_that_of_the_ranks_and_the_plan_makes_the_model(small: Path) -> None:
    given: dict[str, Any] = dict(ranking=fb.EVARanks(rho=8.0), adapter=fb.LoRA(1, 2.0))  # some get none
    made = plan_model(small, None, ROWS, settings(**given))
    shapes = {n: c["shape"] for n, c in made.costs.items()}
    trained = sum(r * sum(shapes[n]) for n, r in ranks(made).items())
    assert min(ranks(made).values()) == 0 and made.memory["adapters"] == 4 * trained and made.memory["optimizer"] == 8 * trained
    assert made.solver["ranks"] == {"paper": "eva_ranks", "rho": 8.0}
    tight = plan_model(small, "3 bits", ROWS, settings(**given, planner=fb.Uniform()))
    assert ranks(tight) == ranks(made) and {s.format for s in tight.modules.values()} == {fb.NF(2, 32)}
    assert {r["name"] for r in made.solver["alternatives"]} >= {"2 bits everywhere", "4 bits everywhere"}
    assert again(Plan.from_json(made.to_json())).to_json() == made.to_json()
    model, _ = load_planned(made, ROWS)
    held = {n: sum(p.numel() for p in h.parameters() if p.requires_grad) for n, h in fb.hosts(model)}
    assert held == {n: r * sum(shapes[n]) for n, r in ranks(made).items()}


def planned(recipe: Recipe) -> Plan:
    return priced(recipe, rows_of(recipe))


def test_from_a_recipe(small: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{row["text"]}"}}\n' for row in ROWS))
    held = tmp_path / "held.jsonl"
    held.write_text(f'{{"text": "{ROWS[0]["text"]}"}}\n')
    text = f"""
recipe: 1
model: {{model_name_or_path: {small}, dtype: float32}}
data: {{datasets: [{{path: {rows}}}], held_out: {{path: {held}}}, max_length: 64}}
quantization: {{candidates: [nf4-b32], calibration_rows: {COUNT}}}
adapter: {{rank: {RANK}, alpha: 8, init: eva, ranks: {{paper: eva_ranks, rho: 2.0}}}}
output_dir: {tmp_path / "out"}
"""
    made = planned(Recipe.parse(text))
    assert ranks(made) == wanted(small, 2.0) and "given out by eva_ranks(rho=2.0): " in made.summary()
    spread = planned(Recipe.parse(text, overrides=["adapter.ranks=lamda_pp"]))
    assert set(ranks(spread).values()) <= {2, 4, 8} and sum(ranks(spread).values()) <= RANK * 14
    plain = planned(Recipe.parse(text, overrides=["adapter.ranks=[]"]))
    assert set(ranks(plain).values()) == {RANK} and "ranks" not in plain.solver and "Ranks" not in plain.summary()
    for wrong, said in (
        ("adapter.ranks=lagrange", "lagrange is one of planners. Known: colora, diffora, eva_ranks, lamda_pp"),
        ("adapter.ranks=[0]", "adapter.ranks"),
    ):
        with pytest.raises(RecipeError, match=said):
            Recipe.parse(text, overrides=[wrong])


@pytest.mark.parametrize("name", registry.names("ranks"))
def test_every_ranking_gives_out_ranks(small: Path, name: str) -> None:
    made = plan_model(small, None, ROWS, settings(ranking=registry.from_json("ranks", name), init=fb.Zeros()))
    assert made.solver["ranks"]["paper"] == name and 0 < sum(ranks(made).values()) <= RANK * 14


def test_diffora_leaves_adapters_where_its_search_has_them(small: Path) -> None:
    made = plan_model(small, None, ROWS, settings(ranking=fb.DiffoRA(share=0.5, passes=2), init=fb.Zeros()))
    assert sorted(ranks(made).values()) == [0] * 7 + [RANK] * 7
    assert made.to_json() == plan_model(small, None, ROWS, settings(ranking=fb.DiffoRA(share=0.5, passes=2), init=fb.Zeros())).to_json()
    with pytest.raises(Mistake, match="DiffoRA gives out ranks by what calibration rows show, and there are none"):
        plan_model(small, None, None, settings(ranking=fb.DiffoRA(), init=fb.Zeros()))


def test_modules_that_are_left_out_share_a_pair_from_the_plan_to_a_saved_folder(small: Path, tmp_path: Path) -> None:
    """Whatever start the others have; priced once and written once."""
    made = plan_model(small, None, ROWS, settings(ranking=fb.DiffoRA(share=0.5, passes=1, pair=1), init=fb.LoftQ(steps=1)))
    kinds = [(type(s.adapter).__name__, type(s.init).__name__) for s in made.modules.values()]
    assert sorted(kinds) == [("LoRA", "LoftQ")] * 7 + [("SharedLoRA", "Zeros")] * 7
    assert fb.Plan.from_json(made.to_json()) == made
    model, _ = fb.load_planned(made)
    hosts = dict(fb.hosts(model))
    shapes = {tuple(hosts[name].weight.shape) for name, s in made.modules.items() if type(s.adapter).__name__ == "SharedLoRA"}
    pairs = {
        id(p) for name, s in made.modules.items() if type(s.adapter).__name__ == "SharedLoRA" for p in hosts[name].p["default"].values()
    }
    assert len(pairs) == 2 * len(shapes)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert made.memory["adapters"] == 4 * sum(p.numel() for p in trained)
    fb.save(model, tmp_path / "saved")
    with torch.no_grad():
        for p in trained:
            p.add_(1.0)
    again, _ = fb.load(tmp_path / "saved")
    assert len([p for p in again.parameters() if p.requires_grad]) == len(trained)


def test_what_cannot_be_given_out_is_refused(small: Path) -> None:
    with pytest.raises(Mistake, match="by what calibration rows show, and there are none: name data.datasets"):
        plan_model(small, None, None, settings())
    with pytest.raises(Mistake, match="--fast reads neither"):
        plan_model(small, None, None, settings(), fast=True)
    for asked, adapter, said in (
        (dict(), fb.RandLoRA(), "RandLoRA has none"),
        (dict(ranking=None, ranks=(2, 4)), fb.VeRA(rank=4), "matrices of one shape hold A and B of VeRA together"),
    ):
        with pytest.raises(Mistake, match=f"ranks are to be chosen, and {said}: leave ranks out or use another adapter"):
            plan_model(small, None, ROWS, settings(adapter=adapter, init=fb.Zeros(), **asked))
    assert ranks(plan_model(small, None, None, settings(ranking=fb.LaMDAPP(), init=fb.Zeros()))) != {}
