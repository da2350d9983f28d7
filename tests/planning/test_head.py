"""An output head in 8 bits: chosen with the bits, trained under, saved, scored against the dense one, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
from finebits.evaluate.heldout import head_of
from finebits.interop.hf import dense_head, load_planned
from finebits.interop.menus import HEAD
from finebits.interop.planning import Settings, plan_model
from finebits.plan.base import Plan
from finebits.plan.levers import PULLS
from finebits.qtensor import QTensor
from finebits.report import tables
from finebits.tasks.causal_lm import CausalLM, head
from tiny_llama import batches
from tiny_llama import folder as tiny_folder

CONFIGS = Path(__file__).parent.parent / "data" / "configs"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    path = tiny_folder(tmp_path_factory.mktemp("untied") / "llama", tie_word_embeddings=False)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a").save_pretrained(path)
    return path


def settings(**more: Any) -> Settings:
    given: dict[str, Any] = dict(
        formats=(fb.NF(2, 32), fb.NF(4, 32)), adapter=fb.LoRA(rank=4, alpha=4), init=fb.LoftQ(steps=1), dtype="float32"
    )
    return Settings(**given | dict(levers=("head",), reserve=0.0, max_length=16, per_device_train_batch_size=2, loss_chunk=8) | more)


@pytest.fixture(scope="module")
def plan(llama: Path) -> Plan:
    free = plan_model(llama, None, None, settings())
    assert free.modules["lm_head"].format is None  # where memory is no matter it stays as it is
    return plan_model(llama, free.peak - 9_000, None, settings())


def test_it_is_the_first_to_go(llama: Path, plan: Plan) -> None:
    assert plan.modules["lm_head"].format == HEAD[1] and plan.modules["lm_head"].adapter is None
    assert plan.memory["head"] == HEAD[1].storage_bits(128, 64) // 8
    stored = sum(c["bytes"] for name, c in plan.costs.items() if name != "lm_head")
    assert plan.memory["linear weights"] == stored
    assert tables.average_bits(tables.matrices(plan)) == pytest.approx(8 * stored / sum(m.weights or 0 for m in tables.matrices(plan)[:-1]))
    fixed = plan_model(llama, plan.budget, None, settings(levers=()))
    assert "lm_head" not in fixed.modules and plan.solver["loss"] < fixed.solver["loss"]


def test_trained_under_saved_and_scored(llama: Path, plan: Plan, tmp_path: Path) -> None:
    model, _ = load_planned(plan)
    assert isinstance(model.get_output_embeddings().weight, QTensor) and not any(
        "lm_head" in k for k, p in model.named_parameters() if p.requires_grad
    )
    batch = batches(rows=3)[0]
    loss = CausalLM().loss(model, batch, 4)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    wanted = torch.nn.functional.cross_entropy(full[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-3)
    fb.save(model, tmp_path / "out")
    again, _ = fb.load(tmp_path / "out")
    one, two = model.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    dense = dense_head(model, llama)
    states = torch.randn(3, 64)
    original = load_planned(Plan.from_json(plan.to_json()).unquantized())[0]
    assert torch.equal(head_of(dense)(states), head_of(head(original))(states))
    assert not torch.equal(head_of(dense)(states), head_of(head(model))(states)) and dense_head(original, llama) is head(original)


@pytest.mark.parametrize("target", ["adapter", "merged"])
def test_exported_with_its_head(plan: Plan, tmp_path: Path, target: str) -> None:
    from finebits.interop import peft

    model, tokenizer = load_planned(plan)
    peft.export(model, tmp_path / target, target, tokenizer)
    found = peft.verify(tmp_path / target, target, model, batches(), tolerance=1e-3)
    assert found["verdict"] in ("same", "ok") and found["max_logit_difference"] < (1e-3 if target == "adapter" else 0.5)


def test_which_models_have_such_a_head() -> None:
    given = settings(device="cuda", dtype="bfloat16", formats=(fb.NF(4, 64, "bf16"),), levers=PULLS)
    heads = {
        p.name: "lm_head" in plan_model(p, None, None, given, fast=True).modules for p in CONFIGS.iterdir() if p.name != "llama-3.1-70b"
    }
    assert heads == {"llama-3.2-3b": False, "qwen3-4b": False, "gemma-3-4b": False, "qwen3-8b": True, "mixtral-8x7b": True}
