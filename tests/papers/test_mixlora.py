"""MixLoRA (arXiv:2404.15159v3), and its balance loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import finebits as fb
import tiny_llama as tiny
from finebits.adapters.base import FeedForward
from finebits.anatomy import found
from finebits.build import all_hosts

M, N = 12, 8
WEIGHTS = [torch.randn(s, generator=torch.Generator().manual_seed(3)) for s in ((M, N), (M, N), (N, M))]


def sublayer(W: Any = None, **more: Any) -> FeedForward:
    gate, up, down = WEIGHTS if W is None else W
    both = lambda x: (F.linear(x, gate), F.linear(x, up))  # noqa: E731
    whole = lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)  # noqa: E731
    return FeedForward(whole, both, F.silu, lambda h: F.linear(h, down), (M, N), **more)


def somewhere(adapter: fb.MixLoRA) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return {k: v + 0.3 * torch.randn(v.shape, generator=gen) for k, v in adapter.params(sublayer(), gen, {}).items()}


def expert(adapter: fb.MixLoRA, p: dict[str, torch.Tensor], e: int) -> FeedForward:
    """The sublayer with one expert's updates merged."""
    parts = zip(("gate", "up", "down"), WEIGHTS, strict=True)
    return sublayer([W + adapter.s * p[f"{k}_B"][e] @ p[f"{k}_A"][e] for k, W in parts])


def test_the_published_share_is_reached() -> None:
    """LLaMA-2-7B, 8 experts of rank 16, LoRA on q and v: 2.9 % of 6.738 B."""
    d, inner, layers = 4096, 11008, 32
    adapter, lora = fb.MixLoRA(rank=16, experts=8), fb.LoRA(rank=16)
    trained = layers * (adapter.size(inner, d) + 2 * lora.size(d, d))
    assert adapter.size(inner, d) == 8 * 16 * 3 * (d + inner) + 8 * d
    assert round(trained / 6_738_415_616, 5) == 0.02894


def test_it_is_the_weighted_sum_of_its_experts_a_token_at_a_time() -> None:
    adapter, x = fb.MixLoRA(rank=3, experts=5, top_k=2), torch.randn(2, 7, N)
    p = somewhere(adapter)
    wanted = torch.zeros_like(x)
    for i, token in enumerate(x.view(-1, N)):
        shares = (p["router"] @ token).softmax(0)
        best = shares.argsort(descending=True)[:2]
        mixed = sum(shares[e] * expert(adapter, p, int(e))(token) for e in best) / shares[best].sum()
        wanted.view(-1, N)[i] = mixed
    torch.testing.assert_close(adapter.forward(p, x, sublayer()), wanted, rtol=1e-4, atol=1e-4)


def test_one_expert_or_equal_experts_are_a_lora_over_the_three_matrices() -> None:
    one, x = fb.MixLoRA(rank=3, experts=1, top_k=1), torch.randn(4, N)
    p = somewhere(one)
    torch.testing.assert_close(one.forward(p, x, sublayer()), expert(one, p, 0)(x), rtol=1e-5, atol=1e-5)
    many = fb.MixLoRA(rank=3, experts=4)
    q = {k: v.expand(4, *v.shape[1:]) if k != "router" else torch.randn(4, N) for k, v in p.items()}
    torch.testing.assert_close(many.forward(q, x, sublayer()), expert(one, p, 0)(x), rtol=1e-5, atol=1e-5)


def test_experts_that_a_token_does_not_go_to_do_not_touch_it() -> None:
    adapter, x = fb.MixLoRA(rank=3, experts=5), torch.randn(1, N)
    p = somewhere(adapter)
    noted: list[Any] = []
    y = adapter.forward(p, x, sublayer(note=noted.append))
    idle = noted[0][1].sum((0, 1)) == 0
    assert idle.sum() == 3
    q = {k: v if k == "router" else torch.where(idle.view(-1, 1, 1), v + 1, v) for k, v in p.items()}
    assert torch.equal(adapter.forward(q, x, sublayer()), y)


def test_the_router_computes_in_float32() -> None:
    model = routed("bfloat16")
    noted = watched(model)
    assert all(probabilities.dtype == torch.float32 for probabilities, _ in noted)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(probabilities.dtype == torch.float32 for probabilities, _ in watched(model))


def routed(dtype: str = "float32", experts: int = 4) -> Any:
    model = tiny.fresh(dtype=getattr(torch, dtype))
    over = dict.fromkeys(found(model, "feed_forward"), fb.MixLoRA(rank=2, experts=experts))
    return fb.build(model, fb.Plan({}, over=over, levers=fb.Levers(dtype=dtype)))


def watched(model: Any) -> list[Any]:
    run = fb.Run(model, dict(all_hosts(model)))
    rule = fb.MixLoRABalance()
    rule.before_forward(run)
    tiny.logits(model)
    return [host.noted for host in run.hosts.values()]


def balance(model: Any, batch: Any, weight: float = 1.0) -> float:
    run, rule = fb.Run(model, dict(all_hosts(model))), fb.MixLoRABalance(weight)
    rule.before_forward(run)
    with torch.no_grad():
        model(**{k: batch[k] for k in ("input_ids", "attention_mask")}, use_cache=False)
    found = float(rule.penalty(run))
    rule.after_backward(run)
    assert not model._forward_pre_hooks and all(host.noted is None and not host.listens for host in run.hosts.values())
    return found


def test_an_even_load_costs_k_and_a_crowd_costs_e() -> None:
    model, batch = routed(experts=8), tiny.batches()[0]
    for _, host in all_hosts(model):
        torch.nn.init.zeros_(host.p["default"]["router"])
    assert balance(model, batch) == pytest.approx(2.0) and balance(model, batch, 0.25) == pytest.approx(0.5)
    rule = fb.MixLoRABalance()
    crowd, to = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]).expand(6, 8), torch.eye(8).long()[None, :2].expand(6, 2, 8)
    assert float(rule._balance(crowd, to)) == pytest.approx(8.0)


def test_padding_is_no_token() -> None:
    model, batch = routed(), tiny.batches()[0]
    wide = {k: F.pad(v, (0, 5), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    assert balance(model, wide) == pytest.approx(balance(model, batch), rel=1e-5)
    rows = [{k: v[i : i + 1, : int(batch["attention_mask"][i].sum())] for k, v in batch.items()} for i in range(3)]
    assert balance(model, {k: v | 1 if k == "attention_mask" else v for k, v in wide.items()}) != pytest.approx(
        balance(model, batch), rel=1e-4
    )
    assert all(balance(model, row) > 0 for row in rows)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_balance_spreads_the_load_whatever_the_step_is_cut_into(parts: int) -> None:
    batch = tiny.batches()[0]
    step = [{k: v[i : i + 3 // parts] for k, v in batch.items()} for i in range(0, 3, 3 // parts)]

    def crowded() -> Any:
        """Most tokens like the first expert: states have a mean."""
        model = routed()
        for _, host in all_hosts(model):
            host.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
            host.p["default"]["router"].data[0] += 0.02
        return model

    def after(rules: list[Any], checkpointing: bool = False) -> tuple[list[float], float]:
        model = crowded()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
        losses = fb.train(model, [step] * 8, optimizer, total=8, rules=rules)
        return losses, balance(model.eval(), batch)

    before, plain = balance(crowded(), batch), after([])
    assert after([fb.MixLoRABalance(0.0)]) == plain
    losses, spread = after([fb.MixLoRABalance(10.0)])
    assert spread < before - 0.1 and spread < plain[1] - 0.1
    assert after([fb.MixLoRABalance(10.0)], checkpointing=True)[0] == pytest.approx(losses, rel=1e-4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="1 <= top_k <= experts; got top_k 3 and experts 2"):
        fb.MixLoRA(experts=2, top_k=3)
    with pytest.raises(ValueError, match=r"mixlora\.attention lies over matrices, and PromptTuning does not"):
        fb.MixLoRA(attention=fb.PromptTuning())
    with pytest.raises(ValueError, match="MixLoRABalance needs adapters with a router"):
        fb.train(tiny.fresh(), [[tiny.batches()[0]]], torch.optim.SGD([torch.ones(1)]), total=1, rules=[fb.MixLoRABalance()])
