"""LISA and OwLore: few blocks are trained at a time, and nothing is held of the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
import tiny_llama as tiny
from finebits.rules.base import Rule, Run

BLOCKS = 4


def model(format: Any = None) -> Any:
    return fb.build(tiny.fresh(num_hidden_layers=BLOCKS), fb.Plan(_specs(format), levers=fb.Levers(dtype="float32")))


def _specs(format: Any) -> dict[str, fb.Spec]:
    net = tiny.fresh(num_hidden_layers=BLOCKS)
    return {n: fb.Spec(format, adapter=fb.Full()) for n, m in net.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def run(net: Any, rule: Rule | None, steps: int, first: int = 0, optimizer: Any = None, see: Any = None, passes: int = 1) -> Any:
    optimizer = optimizer or torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    at = Run(net, {}, optimizer, first, 100)
    for t in range(first, first + steps):
        at.step = t
        before = {k: p.detach().clone() for k, p in net.named_parameters()}
        if rule is not None:
            rule.before_forward(at)
        for i in range(passes):
            ids = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(10 * t + i))
            net(input_ids=ids, labels=ids).loss.backward()
        if rule is not None:
            rule.after_backward(at)
        optimizer.step()
        at.step = t + 1
        if rule is not None:
            rule.after_step(at)
        optimizer.zero_grad()
        if see is not None:
            see(t, {k for k, p in net.named_parameters() if not torch.equal(p, before[k])}, optimizer)
    return optimizer


@pytest.mark.parametrize("passes", [1, 4])
def test_others_stand_still_and_nothing_is_held_of_them(passes: int) -> None:
    net, rule, seen = model(), fb.LISA(blocks=2, every=3), list[tuple[int, ...]]()
    own = {i: sum(p.numel() for k, p in net.named_parameters() if f".layers.{i}." in k and p.requires_grad) for i in range(BLOCKS)}

    def see(t: int, moved: set[str], optimizer: Any) -> None:
        blocks = tuple(sorted({int(k.split(".layers.")[1].split(".")[0]) for k in moved}))
        seen.append(blocks)
        assert blocks == tuple(rule.chosen(t // 3, BLOCKS)) and len(blocks) == 2
        held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim)
        assert held == 8 * sum(own[i] for i in blocks)

    run(net, rule, 33, see=see, passes=passes)
    assert len(set(seen)) > 3


def test_with_all_blocks_and_with_none_of_it_it_is_adamw() -> None:
    nets = [model(), model(), model()]
    for net, rule in zip(nets, (None, fb.LISA(blocks=BLOCKS, every=2), fb.LISA(every=0)), strict=True):
        run(net, rule, 5)
    first, *others = ([p.detach() for p in net.parameters()] for net in nets)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("rule", [fb.LISA(blocks=2, every=2), fb.OwLore(blocks=1, every=2)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("format", [None, fb.Int(8, 32)], ids=str)
def test_a_resumed_run_is_the_run(rule: Any, format: Any) -> None:
    from finebits.optim._shell import made
    from finebits.optim.base import named

    make = lambda net: made(named("adamw"), [p for p in net.parameters() if p.requires_grad], lr=1e-3, seed=1)  # noqa: E731
    whole, again = model(format), model(format)
    rules = [copy.deepcopy(rule) for _ in range(3)]
    run(whole, rules[0], 7, optimizer=make(whole))
    begun = run(again, rules[1], 3, optimizer=make(again))
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in again.state_dict().items()}
    later = model(format)
    later.load_state_dict(state)
    optimizer = make(later)
    optimizer.load_state_dict(copy.deepcopy(begun.state_dict()))
    rules[2].load_state_dict(rules[1].state_dict())
    run(later, rules[2], 4, first=3, optimizer=optimizer)
    for (k, a), b in zip(whole.state_dict().items(), later.state_dict().values(), strict=True):
        assert torch.equal(a, b), k


def test_every_block_is_as_likely() -> None:
    rule, counts = fb.LISA(blocks=2, every=1), torch.zeros(12)
    for j in range(2000):
        drawn = rule.chosen(j, 12)
        assert len(set(drawn)) == 2
        counts[drawn] += 1
    expected = 2000 * 2 / 12
    assert float(((counts - expected) ** 2 / expected).sum()) < 31.26  # chi-square of 11 degrees at .001


def test_each_block_may_be_drawn_by_itself() -> None:
    """With probability γ/L, given that any is; the most at a time is what is priced."""
    rule, counts, sizes = fb.LISA(blocks=2, every=3, draw="each"), torch.zeros(12), list[int]()
    for j in range(2000):
        drawn = rule.chosen(j, 12)
        counts[drawn] += 1
        sizes.append(len(drawn))
    p = 2 / 12 / (1 - (10 / 12) ** 12)
    assert float(((counts - 2000 * p) ** 2 / (2000 * p * (1 - p))).sum()) < 32.91  # chi-square of 12 degrees at .001
    assert min(sizes) == 1 and rule.active(12) == max(sizes[:1000]) and rule.active(12, 30) == max(sizes[:10])
    assert rule.chosen(7, 12) == fb.LISA(blocks=2, draw="each").chosen(7, 12)
    net = model()
    run(net, fb.LISA(blocks=2, every=1, draw="each"), 4)


def test_blocks_with_outliers_are_drawn_more_often() -> None:
    net = model()
    with torch.no_grad():
        net.model.layers[2].mlp.up_proj.weight[::7, ::5] = 3.0
    rule = fb.OwLore(blocks=1, every=1, times=8.0)
    run(net, rule, 1)
    assert max(range(BLOCKS), key=rule.shares.__getitem__) == 2
    X: dict[str, torch.Tensor] = {}
    fresh = model()
    with torch.no_grad():
        fresh.model.layers[2].mlp.up_proj.weight[::7, ::5] = 3.0
    for n, m in fresh.named_modules():
        if isinstance(m, nn.Linear) and "layers.2." in n:
            m.register_forward_hook(lambda m, x, y, n=n: X.__setitem__(n, x[0].detach().flatten(0, 1)))
    ids = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(0))
    fresh(input_ids=ids)
    above = count = 0
    for n, x in X.items():  # the definition
        A = x.norm(dim=0) * fresh.get_submodule(n).weight.abs()
        above, count = above + int((A > 8.0 * A.mean()).sum()), count + A.numel()
    assert rule.shares[2] == pytest.approx(above / count, rel=1e-3)
    drawn = [rule.chosen(j, BLOCKS)[0] for j in range(200)]
    assert drawn.count(2) / 200 == pytest.approx(rule.shares[2] / sum(rule.shares), abs=0.15)


def test_a_model_without_trained_blocks_is_one_sentence() -> None:
    net = tiny.fresh().requires_grad_(False)
    net.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="LISA trains blocks, and nothing in them is trained: take adapter full"):
        fb.LISA().before_forward(Run(net, {}))
