"""Embeddings of 8, 6, 4 or 3 bits in a plan: offered by the recipe, priced, counted, measured, and what they then are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import finebits as fb
from finebits.interop import pricing
from finebits.interop.hf import dense_head, load_planned, start_folder
from finebits.interop.planning import Settings, plan_model
from finebits.interop.selecting import Mistake
from finebits.lookup import Lookup
from finebits.plan.base import Plan, at_end
from finebits.plan.footprint import Footprint
from finebits.plan.solve import again
from finebits.qtensor import QTensor
from finebits.recipe import Recipe
from finebits.report import tables
from finebits.stats.fisher_diag import FisherDiag
from finebits.tasks.causal_lm import head
from tiny_llama import batches

NAME = "model.embed_tokens"
OFFERED = (None, fb.Int(8, 32, scale="fp16"), fb.Int(6, 32, scale="fp16"), fb.NF(4, 32, scale="bf16"), fb.NF(3, 32, scale="bf16"))
ROWS = [{"text": " ".join(f"w{(i * j * j) % 120 + 1}" for j in range(14))} for i in range(1, 9)]


def settings(**more: Any) -> Settings:
    given: dict[str, Any] = dict(
        formats=(fb.NF(2, 32), fb.NF(4, 32)), embeddings=OFFERED, adapter=fb.LoRA(rank=4, alpha=4), init=fb.Zeros()
    )
    given |= dict(reserve=0.0, loss_chunk=8, dtype="float32", calibration_rows=4, max_length=16, per_device_train_batch_size=2)
    return Settings(**given | more)


@pytest.fixture(scope="module")
def plan(small: Path) -> Plan:
    """One whose table has given way."""
    free = plan_model(small, None, None, settings())
    assert free.modules[NAME].format is None  # where memory is no matter it stays as it is
    return plan_model(small, free.peak - 25_000, None, settings())


def test_asked_for_by_the_recipe_alone(small: Path) -> None:
    recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=["quantization.embeddings=[null, int6-b32-fp16, nf3]"])
    assert Settings.of(recipe).embeddings == (None, fb.Int(6, 32, scale="fp16"), fb.NF(3))
    assert Settings().embeddings == () and NAME not in plan_model(small, None, None, settings(embeddings=())).modules
    with pytest.raises(ValueError, match="nf9"):
        Recipe.parse("model: {model_name_or_path: m}", overrides=["quantization.embeddings=[nf9]"])


def test_every_byte_of_it(small: Path, plan: Plan) -> None:
    format = plan.modules[NAME].format
    assert format is not None and plan.modules[NAME].adapter is None and at_end(plan.costs[NAME]) == "embeddings"
    bare = plan_model(small, None, None, settings(embeddings=()))
    held, dense = format.storage_bits(128, 64) // 8, 128 * 64 * 4
    assert plan.memory["embeddings"] == held and bare.memory["embeddings"] == dense and bare.memory["head"] == plan.memory["head"] == 0
    everything = plan_model(small, None, None, settings(embeddings=(None,)))
    assert everything.memory == bare.memory and {k: v for k, v in everything.rows.items() if k in ("full", "save")} == {
        k: v for k, v in bare.rows.items() if k in ("full", "save")
    }
    g = Footprint.of(plan).geometry
    assert (g.embeddings, g.packed, g.taught) == (0, 128 * 64, 128 * 64) and type(g).of(g.to_json()) == g
    assert "packed" not in bare.sizes["geometry"]
    alone = plan_model(small, plan.budget, None, settings(left_out=("full",)))
    assert plan.rows["eval"] - alone.rows["eval"] == dense + plan.memory["embeddings"] - alone.memory["embeddings"] + (
        plan.memory["linear weights"] - alone.memory["linear weights"]
    )
    assert plan.memory["linear weights"] == sum(c["bytes"] for name, c in plan.costs.items() if name != NAME)
    assert tables.average_bits(tables.matrices(plan)) == pytest.approx(
        8 * plan.memory["linear weights"] / sum(m.weights or 0 for m in tables.matrices(plan) if not m.head)
    )
    assert again(Plan.from_json(plan.to_json())).to_json() == plan.to_json()
    model, _ = load_planned(plan)
    assert model.get_input_embeddings().weight.nbytes == held


def test_bits_of_a_linear_weight_do_not_count_it(small: Path) -> None:
    made = plan_model(small, "4.6 bits", None, settings(embeddings=(fb.NF(4, 32), fb.Int(8, 32))))
    assert made.modules[NAME].format == fb.Int(8, 32)  # the least loss of what is offered
    assert 8 * made.memory["linear weights"] / sum(m.weights or 0 for m in tables.matrices(made) if not m.head) <= 4.6


def test_started_in_memory_and_in_a_stream(plan: Plan, tmp_path: Path) -> None:
    model, _ = load_planned(plan)
    assert isinstance(model.get_input_embeddings(), Lookup) and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    fb.save(model, tmp_path / "one")
    start_folder(plan, tmp_path / "two")
    files = ("base.safetensors", "adapter.safetensors")
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    loaded, _ = fb.load(tmp_path / "two")
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("more", [dict(init=fb.QERA()), dict(calibration="sweep", init=fb.QERA(), refine=(fb.ApiQ(epochs=1),))], ids=str)
def test_a_start_that_runs_the_model_sees_its_rows(small: Path, more: Any) -> None:
    made = plan_model(small, None, ROWS, settings(embeddings=(fb.NF(3, 32),), objective="weight", **more))
    model, _ = load_planned(made, ROWS)
    table = model.get_input_embeddings().weight
    assert isinstance(table, QTensor) and model.get_output_embeddings().weight is table
    weight = AutoModelForCausalLM.from_pretrained(small).get_input_embeddings().weight
    assert torch.equal(table.dequantize(), fb.quantize(weight.detach(), fb.NF(3, 32)).dequantize())


def test_scored_against_the_dense_head(small: Path, plan: Plan) -> None:
    model, _ = load_planned(plan)
    teacher = dense_head(model, small)
    original = load_planned(plan.unquantized())[0]
    assert not isinstance(original.get_input_embeddings(), Lookup)
    assert torch.equal(teacher.module.weight, original.get_output_embeddings().weight)  # type: ignore[arg-type]
    assert head(model).frozen_product and dense_head(original, small) is head(original)


def test_fisher_information_of_both_uses(small: Path) -> None:
    """Against autograd: per place, the squared gradient of a row that is looked up; of the head, the mean over all labels that could be."""
    made = plan_model(small, None, ROWS, settings(embeddings=()))
    calibration = pricing.Calibration(small, ROWS[:4], made.workload)
    batches = calibration.batches(calibration.rows)
    seen = dict(next(s for s in calibration.statistics({NAME: frozenset({FisherDiag})}, drawn=True) if NAME in s))
    found = seen[NAME][FisherDiag]
    model = load_planned(made.unquantized())[0]
    task, gen, wanted = calibration.task, torch.Generator().manual_seed(0), torch.zeros(128, 64)
    loss = task.drawn(gen)
    for b in batches:
        out: list[torch.Tensor] = []
        handle = model.get_input_embeddings().register_forward_hook(lambda m, i, o, out=out: out.append(o.requires_grad_()))
        (g,) = torch.autograd.grad(loss(model, b), out)
        handle.remove()
        for v, row in zip(b["input_ids"][0], g[0], strict=True):
            wanted[v] += row.square()
        with torch.no_grad():
            h = task.states(model, b)[:, :-1][b["labels"][:, 1:] != -100]
            p = (h @ model.lm_head.weight.T).softmax(-1)
        for one, probabilities in zip(h, p, strict=True):
            for y in range(128):
                r = probabilities.clone()
                r[y] -= 1
                wanted += probabilities[y] * torch.outer(r.square(), one.square())
    assert found.tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    torch.testing.assert_close(found.total, wanted, rtol=1e-3, atol=1e-6)


def test_priced_in_nats_and_measured(small: Path) -> None:
    made = plan_model(small, None, ROWS, settings(objective="kl"))
    losses = [line["loss"] for line in made.costs[NAME]["menu"]]
    assert losses[0] == 0 and losses == sorted(losses) and losses[1] > 0
    tight = again(made, budget=made.peak - 27_000)
    assert tight.modules[NAME].format is not None and tight.solver["kl"]["variants"]
    # really measured: the variant with the table in codes is the model with the table in codes
    calibration = pricing.Calibration(small, ROWS, made.workload)
    menu = {name: [o for o in options] for name, options in _menu(made).items()}
    dense = {name: options[-1] for name, options in menu.items()}
    table = pricing.CostTable(small, "weight", "variants", 4, False)
    before = calibration.streamed.model.get_output_embeddings().weight
    kls = [pricing.evaluate(calibration, [dense | {NAME: o}], table)[0].measured for o in menu[NAME]]
    assert len(set(kls)) == len(kls) and kls[4] > kls[0]
    assert (
        calibration.streamed.model.get_output_embeddings().weight is before and type(calibration.streamed.model.lm_head) is torch.nn.Linear
    )


def _menu(plan: Plan) -> Any:
    from finebits.plan.problem import menu_of

    return menu_of(plan)


def test_what_is_refused(small: Path, small_untied: Path) -> None:
    with pytest.raises(Mistake, match="gives all matrices one candidate: leave quantization.embeddings out"):
        plan_model(small, None, None, settings(planner=fb.Uniform()))
    with pytest.raises(Mistake, match="embed_tokens is to be trained .* and held in codes .*: leave one of the two out"):
        plan_model(small, None, None, settings(modules_to_save=["embed_tokens"]))
    made = plan_model(small_untied, None, None, settings(embeddings=(fb.NF(4, 32),)))
    assert Footprint.of(made).geometry.taught == 0 and made.memory["head"] == 128 * 64 * 4
    model, _ = load_planned(made)
    assert isinstance(model.get_input_embeddings(), Lookup) and type(model.lm_head) is torch.nn.Linear
