"""Rules while planning: what they hold is a term of memory, and a model that they cannot act on is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
import tiny_llama as tiny
from finebits.rules.base import Laid, Scene


def planned(small: Path, **said: Any) -> fb.Plan:
    more: dict[str, Any] = dict(max_length=32, per_device_train_batch_size=2, candidates=["nf4-b32"], dtype="float32") | said
    return fb.plan_model(str(small), None, fast=True, **more)


def test_a_plan_counts_what_rules_hold_to_the_byte(small: Path) -> None:
    """AdaLoRA's averages after real steps; GGPO's norms, and the noise of the largest weight while it is drawn."""
    adapter = {"adapter": fb.Gated(rank=4), "init": fb.Zeros()}
    without = planned(small, **adapter)
    assert "rules" not in without.memory and "rules" not in without.sizes["geometry"]
    assert planned(small, **adapter, rules=["lora_plus"]).hash == without.hash
    plan = planned(small, **adapter, rules=[{"paper": "adalora", "orthogonal": 0.0}])
    assert plan.peak - without.peak == plan.memory["rules"] and fb.Plan.from_json(plan.to_json()) == plan
    model, _ = fb.load_planned(plan)
    rule = fb.AdaLoRA(orthogonal=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    fb.train(model, [[b] for b in tiny.batches()[:2]], optimizer, total=2, rules=[rule])
    held = [t for part in (rule.mean, rule.spread, rule.open) for t in part.values()]
    assert plan.memory["rules"] == sum(t.nbytes for t in held) > plan.memory["optimizer"]
    both = planned(small, **adapter, rules=[{"paper": "adalora", "orthogonal": 0.0}, {"paper": "sora"}])
    assert both.memory["rules"] == plan.memory["rules"]
    rows = sum(cost["shape"][0] for cost in plan.costs.values())
    largest = max(m * n for m, n in (cost["shape"] for cost in plan.costs.values()))
    assert planned(small, rules=["ggpo"]).memory["rules"] == (8 + 4) * rows + 8 * largest


def test_what_a_rule_keeps_of_a_token_is_in_the_blocks(small: Path) -> None:
    without, plan = (planned(small, rules=rules, gradient_checkpointing=False) for rules in ([], ["density_loss"]))
    units, tokens = 2 * 96, 2 * 32
    assert plan.memory["activations"] - without.memory["activations"] == 8 * units * tokens
    again = planned(small, rules=["density_loss"]).memory["one block"] - planned(small).memory["one block"]
    assert again == 8 * units * tokens // 2


def test_a_density_is_kept_in_the_bytes_that_are_counted() -> None:
    h, kept = torch.randn(3, 5, requires_grad=True), dict[int, int]()

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = fb.DensityLoss().density(h)
    assert sum(kept.values()) - h.untyped_storage().nbytes() == 3 * fb.DensityLoss().per_token(Scene(units=(5,))) and alive.requires_grad


def test_a_model_without_blocks_or_activations_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finebits.interop import planning

    real = planning.meta

    def bare(*args: Any) -> Any:
        shell = real(*args)
        shell.model.layers = nn.Sequential(*shell.model.layers)
        for layer in shell.model.layers:
            layer.mlp.act_fn = nn.Tanh()
        return shell

    monkeypatch.setattr(planning, "meta", bare)
    for rule, said in (
        ("layer_drop", "LayerDrop goes by the blocks of a model, and LlamaForCausalLM has no list of them: leave the rule out"),
        ("layerwise_lr", "LayerwiseLR goes by the blocks of a model, and LlamaForCausalLM has no list of them: leave the rule out"),
        ("density_loss", r"DensityLoss looks at modules .* and LlamaForCausalLM has none: leave the rule out"),
    ):
        with pytest.raises(ValueError, match=said):
            planned(small, rules=[rule])


def test_what_a_short_run_does_not_come_to_is_not_priced() -> None:
    """SpIEL looks at gradients from step `every` on, and keeps deltas as they were once some have been exchanged."""
    rule, scene = fb.SpIEL(every=4, accumulate=2), Scene((Laid(fb.Sparse(rank=2), 8, 6),))
    k = fb.Sparse(rank=2).size(8, 6)
    price = lambda steps: (rule.state(scene._replace(steps=steps)), rule.work(scene._replace(steps=steps)))  # noqa: E731
    assert price(4) == (4 * k, 0)
    assert price(5) == (24 * k, 32 * 8 * 6)
    assert price(7) == price(None) == (24 * k, 32 * 8 * 6 + 4 * k)
    assert rule.state(scene) == price(None)[0]
