"""LoRA+ (arXiv:2402.12354) and rates by depth (arXiv:1801.06146, 2106.08254): tables, ratios of steps, and both at once under a schedule."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from papers.rules import linears, llama, step, tensors, trained


def test_the_table_of_a_model_of_twelve_blocks() -> None:
    """timm's and BEiT's: .75 to the power of the blocks above."""
    rule = fb.LayerwiseLR(decay=0.75)
    assert [round(rule.scale(layer, 12), 4) for layer in (0, 1, 12, 13)] == [0.0238, 0.0317, 0.75, 1.0]


def rates(model: torch.nn.Module, rules: list[fb.Rule], lr: float = 1.0) -> dict[str, float]:
    optimizer = torch.optim.SGD(trained(model), lr=lr)
    fb.factor(optimizer, rules, fb.Run(model, dict(fb.hosts(model)), optimizer))
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found) == len(trained(model))
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_adapters_have_the_rate_of_the_block_that_owns_them() -> None:
    model = llama(layers=3)
    for p in (model.model.norm.weight, model.model.embed_tokens.weight, model.lm_head.weight):
        p.requires_grad_(True)
    found = rates(model, [fb.LayerwiseLR(decay=0.5)])
    assert found["model.layers.0.self_attn.q_proj.p.default.A"] == 0.125 and found["model.layers.2.mlp.up_proj.p.default.B"] == 0.5
    assert (found["model.norm.weight"], found["lm_head.weight"], found["model.embed_tokens.weight"]) == (1.0, 1.0, 0.0625)


def test_a_tied_head_counts_with_the_embeddings() -> None:
    model = llama(layers=2, tie_word_embeddings=True)
    model.lm_head.weight.requires_grad_(True)
    assert rates(model, [fb.LayerwiseLR(decay=0.5)])["model.embed_tokens.weight"] == 0.125


def test_lora_plus_has_the_rates_of_pefts_own() -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(5, 7))
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["0"]))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16.0)
    wanted = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {("B" if "lora_B" in n else "A"): wanted[id(p)] for n, p in theirs.named_parameters() if p.requires_grad}
    ours = rates(linears(fb.LoRA(rank=2)), [fb.LoRAPlus(ratio=16.0)], lr=0.1)
    assert {n.rpartition(".")[2]: r for n, r in ours.items()} == pytest.approx(named) == {"A": 0.1, "B": 1.6}


def test_under_sgd_steps_on_B_are_ratio_times_as_long() -> None:
    moved = {}
    for ratio in (1.0, 16.0):
        model, x = linears(fb.LoRA(rank=2)), torch.ones(3, 5)
        before = {k: v.detach().clone() for k, v in tensors(model).items()}
        optimizer, rule = torch.optim.SGD(trained(model), lr=2.0**-10), fb.LoRAPlus(ratio)
        fb.factor(optimizer, [rule], fb.Run(model, dict(fb.hosts(model)), optimizer))
        step(model, rule, lambda m: m[0](x).square().sum(), optimizer)
        moved[ratio] = {k: v.detach() - before[k] for k, v in tensors(model).items()}
    torch.testing.assert_close(moved[16.0]["B"], 16 * moved[1.0]["B"], rtol=1e-4, atol=1e-5)
    assert torch.equal(moved[16.0]["A"], moved[1.0]["A"])


def test_both_multiply_and_a_schedule_multiplies_both() -> None:
    model = llama(layers=2)
    rules = [fb.LoRAPlus(ratio=4.0), fb.LayerwiseLR(decay=0.5)]
    found = rates(model, rules)
    assert found["model.layers.1.mlp.up_proj.p.default.B"] == 2.0 and found["model.layers.0.mlp.up_proj.p.default.A"] == 0.25
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    run = fb.Run(model, dict(fb.hosts(model)), optimizer)
    fb.factor(optimizer, rules, run)
    first = [group["lr"] for group in optimizer.param_groups]
    assert optimizer.param_groups[0]["rate"] == 1.0, "the group nearest to the run's own rate is the first"
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 2 for lr in first]
    fb.factor(optimizer, rules, run)  # a loop that is entered again
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 2 for lr in first]


def test_a_scheduler_that_was_there_first_is_told() -> None:
    model = linears(fb.LoRA(rank=2))
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="call fb.factor"):
        fb.train(model, [], optimizer, total=1, scheduler=schedule, rules=[fb.LoRAPlus()])
