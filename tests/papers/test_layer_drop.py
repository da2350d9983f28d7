"""LayerDrop (arXiv:1909.11556) and stochastic depth (arXiv:1603.09382): how often, what is not computed, and what does not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
from papers.rules import llama, recomputing, step, trained, words


def loss(model: Any) -> torch.Tensor:
    return model(**words(), use_cache=False).loss


def test_blocks_are_left_out_as_often_as_p_says() -> None:
    """Within three standard deviations over 2000 draws; the expected depth is Σ (1 − p_l)."""
    for rule in (fb.LayerDrop(p=0.2), fb.LayerDrop(p=0.4, depth="linear")):
        shares = torch.tensor(rule.shares(4))
        seen = torch.tensor([rule.dropped(t, 4) for t in range(2000)]).float().mean(0)
        assert ((seen - shares).abs() < 3 * (shares * (1 - shares) / 2000).sqrt()).all()


def test_a_block_that_is_left_out_is_as_if_it_were_not_there() -> None:
    """And is not computed, and has a gradient of zeros."""
    model, rule, calls = llama(layers=3), fb.LayerDrop(p=0.5), []
    at = next(t for t in range(50) if rule.dropped(t, 3) == [False, True, False])
    rule.single = {type(model.model.layers[0]): True}
    model.model.layers[1].mlp.register_forward_hook(lambda *a: calls.append(1))
    seen: list[float] = []
    step(model, rule, lambda m: seen.append(float(loss(m).detach())) or loss(m), torch.optim.SGD(trained(model), lr=0.0), at)
    assert not calls and all((p.grad == 0).all() for p in model.model.layers[1].parameters() if p.requires_grad)
    assert any((p.grad != 0).any() for p in model.model.layers[2].parameters() if p.requires_grad)
    shorter = llama(layers=3)
    del shorter.model.layers[1]
    assert seen[0] == float(loss(shorter.train()).detach())
    assert float(loss(model.eval()).detach()) == float(loss(llama(layers=3).eval()).detach()) and calls, "evaluation takes all blocks"


def test_every_block_may_be_left_out() -> None:
    model = llama(layers=2)
    step(model, fb.LayerDrop(p=1.0), loss, torch.optim.AdamW(trained(model), lr=0.01))
    assert all((p.grad == 0).all() for p in trained(model))


def test_stochastic_depth_divides_what_stays() -> None:
    """x + (f(x) − x) / (1 − p_l), by the numbers of a net of linears."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    net, x, rule = Net(), torch.randn(5, 4), fb.LayerDrop(p=0.6, depth="linear")
    for t in range(6):
        out, wanted = [], x
        step(net, rule, lambda m, out=out: out.append(m(x)) or out[0].sum(), torch.optim.SGD(net.parameters(), lr=0.0), t)
        for block, drop, p in zip(net.blocks, rule.dropped(t, 3), (0.2, 0.4, 0.6), strict=True):
            wanted = wanted if drop else wanted + (block(wanted) - wanted) / (1 - p)
        torch.testing.assert_close(out[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", ["uniform", "linear"])
def test_recomputed_blocks_are_left_out_alike(depth: str) -> None:
    grads = []
    for checkpointed in (False, True):
        model, rule = recomputing(llama()) if checkpointed else llama(), fb.LayerDrop(p=0.6, depth=depth)
        optimizer = torch.optim.AdamW(trained(model), lr=0.01)
        for t in range(4):
            step(model, rule, loss, optimizer, t)
        grads.append([p.detach().clone() for p in trained(model)])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_a_cache_that_is_filled_in_training_and_one_that_is_read_afterwards() -> None:
    model, rule = llama(), fb.LayerDrop(p=0.5)
    for t in range(3):
        step(model, rule, lambda m: m(**words(), use_cache=True).loss, torch.optim.SGD(trained(model), lr=0.1), t)
    model.eval()
    ids = words()["input_ids"]
    with torch.no_grad():
        past = model(ids[:, :4], use_cache=True).past_key_values
        torch.testing.assert_close(model(ids[:, 4:], past_key_values=past).logits, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_block_that_gives_more_than_its_states_gives_it_still() -> None:
    class Block(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x.sum()

    net = nn.Module()
    net.blocks = nn.ModuleList([Block(4, 4)])
    x = torch.ones(2, 4)
    rule = fb.LayerDrop(p=1.0)
    rule.before_forward(fb.Run(net, {}))
    for _ in range(2):
        y, more = net.blocks[0](x)
        assert torch.equal(y, x) and more == 8 and y.requires_grad
    rule.after_backward(fb.Run(net, {}))
    assert not torch.equal(net.blocks[0](x)[0], x)
