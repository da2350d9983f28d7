"""DEFT's density loss (arXiv:2402.01911): a table, finite differences, padding, and a density that falls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finebits as fb
from papers.rules import llama, recomputing, step, trained, words


def test_a_smooth_count() -> None:
    eps = 1e-7
    h = torch.tensor([0.0, 1.0, -1.0, eps**0.5], dtype=torch.bfloat16).float()
    torch.testing.assert_close(fb.DensityLoss(eps=eps).density(h), torch.tensor([0.0, 1.0, 1.0, 0.5]), rtol=0, atol=2e-3)


def test_its_pull_is_largest_at_the_root_of_a_third_of_epsilon() -> None:
    rule, eps = fb.DensityLoss(eps=1e-2), 1e-2
    h = torch.linspace(1e-3, 1, 2000).requires_grad_(True)
    (pull,) = torch.autograd.grad(rule.density(h).sum(), h)
    torch.testing.assert_close(pull, 2 * h.detach() * eps / (h.detach() ** 2 + eps) ** 2)
    assert float(h.detach()[pull.argmax()]) == pytest.approx((eps / 3) ** 0.5, abs=1e-3)


def penalty(model: nn.Module, batch: dict[str, torch.Tensor], rule: fb.DensityLoss, grad: bool = False) -> torch.Tensor:
    run = fb.Run(model.train(), dict(fb.hosts(model)))
    rule.before_forward(run)
    loss = model(**batch, use_cache=False).loss
    found = rule.penalty(run)
    if grad:
        (0.0 * loss + found).backward()
    rule.after_backward(run)
    return found if grad else found.detach()


def test_padding_does_not_count() -> None:
    """The same whatever the padding holds, and what the rows have by themselves."""
    model, rule, batch = llama(layers=2), fb.DensityLoss(eps=1e-2), words(pad=2)
    found = float(penalty(model, batch, rule))
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)}
    assert float(penalty(model, other, rule)) == pytest.approx(found, rel=1e-5)
    alone = [{k: v[i : i + 1, : 6 - 2 * i] for k, v in batch.items()} for i in (0, 1)]
    wanted = sum(float(penalty(model, b, rule)) * n for b, n in zip(alone, (6, 4), strict=True)) / 10
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found != pytest.approx(float(penalty(model, {k: v for k, v in batch.items() if k != "attention_mask"}, rule)), rel=1e-4)


def test_the_gradient_is_that_of_the_count_with_recomputed_blocks_too() -> None:
    grads = []
    for checkpointed in (False, True):
        model = recomputing(llama(layers=2)) if checkpointed else llama(layers=2)
        for _ in range(2):  # what the first one left does not count in the second
            model.zero_grad()
            penalty(model, words(pad=1), fb.DensityLoss(weight=3.0, eps=1e-2), grad=True)
        grads.append([p.grad.clone() for p in trained(model) if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0 and all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*grads, strict=True))
    model, rule, batch = llama(layers=1).double(), fb.DensityLoss(eps=1e-2), words(pad=1)
    p = model.model.layers[0].mlp.gate_proj.p["default"]["B"]
    penalty(model, batch, rule, grad=True)
    g = p.grad.clone()
    model.zero_grad()
    with torch.no_grad():
        p[3, 1] += 1e-3
    up = float(penalty(model, batch, rule))
    with torch.no_grad():
        p[3, 1] -= 2e-3
    assert float(g[3, 1]) == pytest.approx((up - float(penalty(model, batch, rule))) / 2e-3, rel=2e-2)


def test_density_falls_by_a_tenth_or_more_for_little_loss() -> None:
    """A regression by a ReLU MLP, whose density is the share of activations that are not zero."""
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    y = torch.sin(x @ torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    found = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        optimizer, rule = torch.optim.Adam(model.parameters(), lr=3e-3), fb.DensityLoss(weight=weight, eps=1e-1)
        for t in range(300):
            step(model, rule, lambda m: (m(x) - y).square().mean(), optimizer, t, 300)
        h = model[1](model[0](x))
        found[weight] = float((h != 0).float().mean()), float((model(x) - y).detach().square().mean())
    assert found[1.0][0] < 0.9 * found[0.0][0] and found[1.0][1] < found[0.0][1] + 0.1


def test_what_it_cannot_look_at() -> None:
    linear = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Sequential has none: leave the rule out"):
        fb.DensityLoss().before_forward(fb.Run(linear, {}))
    model, rule = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), fb.DensityLoss()
    rule.before_forward(fb.Run(model, {}))
    with torch.no_grad(), pytest.raises(ValueError, match="use_reentrant=False"):
        model(torch.ones(1, 3))
