"""ALLoRA (arXiv:2410.09692): κ of rows, gradients row by row, the same forward, and the caveat of optimizers that normalise."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from papers.rules import linears, llama, recomputing, step, tensors, trained, words

X, Y = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)), torch.randn(9, 7, generator=torch.Generator().manual_seed(2))


def squared(model: torch.nn.Module) -> torch.Tensor:
    return (model[0](X) - Y).square().mean()


def kappa(model: torch.nn.Module, eta: float) -> torch.Tensor:
    """From the update written out."""
    host = model[0]
    L, R = host.kinds["default"].lowrank(host.tensors("default"))
    return 1 / ((L @ R).norm(dim=1) + 1 / eta**2).sqrt()


def test_kappa_is_that_of_the_rows_of_the_update_and_eta_at_birth() -> None:
    model = linears(fb.LoRA(rank=2, alpha=3.0))
    host, rule = model[0], fb.ALLoRA(eta=2.0)
    torch.testing.assert_close(rule.kappa(*host.kinds["default"].lowrank(host.tensors("default"))), kappa(model, 2.0))
    born = torch.zeros(7, 2), torch.randn(2, 5)
    assert torch.equal(rule.kappa(*born), torch.full((7,), 2.0))


@pytest.mark.parametrize("adapter", [fb.LoRA(rank=2, alpha=3.0), fb.Gated(rank=2, alpha=3.0)], ids=lambda a: type(a).__name__)
def test_gradients_of_both_factors_under_sgd(adapter: object) -> None:
    """∂B's rows times κ, ∂A = s·diag(λ) Bᵀ diag(κ) G with G of the whole weight, and the loss as it was."""
    model, plain = linears(adapter), linears(adapter)
    k, s, lr = kappa(model, 2.0), 1.5, 0.1
    p, before = tensors(model), {n: t.detach().clone() for n, t in tensors(model).items()}
    W = plain[0].stack().weight.detach().requires_grad_(True)
    (X @ W.T - Y).square().mean().backward()
    gate = before.get("gate", torch.ones(2))
    step(plain, fb.Rule(), squared, torch.optim.SGD(trained(plain), lr=lr))
    run_loss: list[float] = []
    step(
        model,
        fb.ALLoRA(eta=2.0),
        lambda m: run_loss.append(float(squared(m).detach())) or squared(m),
        torch.optim.SGD(trained(model), lr=lr),
    )
    assert run_loss[0] == float(squared(linears(adapter)).detach()), "the forward is the same to the bit"
    torch.testing.assert_close(p["B"].detach() - before["B"], k[:, None] * (tensors(plain)["B"].detach() - before["B"]))
    torch.testing.assert_close(p["A"].detach() - before["A"], -lr * s * (gate[:, None] * before["B"].T) @ (k[:, None] * W.grad))
    assert not model[0]._forward_hooks


def test_rate_multiplies_what_the_optimizer_makes_of_rows_of_B() -> None:
    adapter = fb.LoRA(rank=2, alpha=2.0)
    model, plain = linears(adapter), linears(adapter)
    k, before = kappa(model, 2.0), tensors(model)["B"].detach().clone()
    step(plain, fb.Rule(), squared, torch.optim.AdamW(trained(plain), lr=0.01))
    step(model, fb.ALLoRA(eta=2.0, mode="rate"), squared, torch.optim.AdamW(trained(model), lr=0.01))
    torch.testing.assert_close(
        tensors(model)["B"].detach() - before, k[:, None] * (tensors(plain)["B"].detach() - before), rtol=1e-4, atol=1e-6
    )
    assert torch.equal(tensors(model)["A"], tensors(plain)["A"])


def test_adam_undoes_a_constant_factor() -> None:
    """The caveat: κ that is the same everywhere and always changes nothing under Adam."""
    rule = fb.ALLoRA(eta=4.0)
    rule.kappa = lambda L, R: torch.full((len(L),), 4.0)  # type: ignore[method-assign]
    model, plain = linears(fb.LoRA(rank=2, alpha=2.0)), linears(fb.LoRA(rank=2, alpha=2.0))
    one, other = (torch.optim.Adam(trained(m), lr=0.01, eps=0.0) for m in (model, plain))
    for t in range(10):
        step(model, rule, squared, one, t)
        step(plain, fb.Rule(), squared, other, t)
    for a, b in zip(trained(model), trained(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_blocks_that_are_recomputed_give_the_same_gradients() -> None:
    grads = []
    for checkpointed in (False, True):
        model = recomputing(llama(layers=2)) if checkpointed else llama(layers=2)
        step(model, fb.ALLoRA(), lambda m: m(**words(), use_cache=False).loss, torch.optim.SGD(trained(model), lr=0.0))
        grads.append([p.grad.clone() for p in trained(model) if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_is_refused() -> None:
    from finebits.rules.base import check

    with pytest.raises(ValueError, match="set it to 0"):
        check(fb.ALLoRA(), fb.LoRA(), dropout=0.1)
