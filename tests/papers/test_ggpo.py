"""LoRA-GGPO (arXiv:2502.14538v1) and LoRA-MGPO (v3): the noise's energy, the gradients that stand for the weight's, and a move along momenta."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.rules import _family as family
from finebits.rules.ggpo import drawn
from papers.rules import linears, llama, recomputing, step, tensors, trained, words

X, Y = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)), torch.randn(9, 7, generator=torch.Generator().manual_seed(2))


def squared(model: torch.nn.Module) -> torch.Tensor:
    return (model[0](X) - Y).square().mean()


def test_energy_of_the_rows_is_the_formulas() -> None:
    """Over 400 draws, E‖ε_i‖² = σ² (‖W′_i‖² + β ‖g_i‖²)."""
    weights, gradients = torch.tensor([1.0, 4.0, 0.25]), torch.tensor([0.0, 100.0, 50.0])
    scale = fb.GGPO(sigma=0.3, beta=0.02).deviation(weights, gradients, n=64)
    energy = torch.stack([drawn(scale, seed, 64).square().sum(1) for seed in range(400)]).mean(0)
    torch.testing.assert_close(energy, 0.09 * (weights + 0.02 * gradients), rtol=0.03, atol=0.0)


def test_what_stands_for_the_weights_gradient() -> None:
    """(∂L) R + L (∂R) = s² (G Aᵀ A + B Bᵀ G) for lora, with G of the weight itself."""
    model = linears(fb.LoRA(rank=2, alpha=3.0))
    p, s = tensors(model), 1.5
    W = model[0].stack().weight.detach().requires_grad_(True)
    (X @ W.T - Y).square().mean().backward()
    squared(model).backward()
    P, Q = family.tangent(model[0].kinds["default"], p, {k: t.grad for k, t in p.items()})
    A, B, G = p["A"].detach(), p["B"].detach(), W.grad
    torch.testing.assert_close(P @ Q, s * s * (G @ A.T @ A + B @ B.T @ G), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(family.squares(P, Q), (P @ Q).square().sum(1), rtol=1e-4, atol=1e-5)


def test_outputs_in_training_are_those_of_the_moved_weight_and_of_evaluation_the_weights_own() -> None:
    model, rule = linears(fb.LoRA(rank=2, alpha=2.0)), fb.GGPO(sigma=0.5)
    run, host = fb.Run(model, dict(fb.hosts(model))), model[0]
    still = host(X)
    rule.before_forward(run)
    moved, again = host(X), host(X)
    epsilon = torch.linalg.lstsq(X, (moved - still).detach()).solution.T  # X has full rank
    assert torch.equal(moved, again), "one ε a step, whatever the micro-batch"
    torch.testing.assert_close(moved - still, X @ epsilon.T, rtol=1e-3, atol=1e-4)
    x = X.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(host(x).sum(), x)
    torch.testing.assert_close(g, (host.stack().weight + epsilon).sum(0).expand_as(x), rtol=1e-3, atol=1e-4)
    squared(model).backward()
    rule.after_backward(run)
    assert torch.equal(host(X), still)
    assert rule.state_dict()["gradients"]["0.default"].shape == (7,)


def test_noise_of_outputs_has_the_same_variance() -> None:
    model, found = linears(fb.LoRA(rank=2, alpha=2.0)), {}
    still = model[0](X).detach()
    for noise in ("weight", "output"):
        draws = []
        for seed in range(80):
            rule = fb.GGPO(sigma=0.5, noise=noise, seed=seed)
            torch.manual_seed(seed)
            rule.before_forward(fb.Run(model, dict(fb.hosts(model))))
            draws.append(model[0](X).detach() - still)
            rule.span.close()
        found[noise] = torch.stack(draws).square().mean((0, 1))
    torch.testing.assert_close(found["output"], found["weight"], rtol=0.3, atol=0.0)


@pytest.mark.parametrize(
    "rule", [fb.GGPO(sigma=0.3, beta=1.0), fb.GGPO(sigma=0.3, noise="output"), fb.MGPO(rho=0.5)], ids=["weight", "output", "momentum"]
)
def test_blocks_that_are_recomputed_give_the_same_gradients(rule: fb.Rule) -> None:
    grads = []
    for checkpointed in (False, True):
        model = recomputing(llama(layers=2)) if checkpointed else llama(layers=2)
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(trained(model), lr=0.01)
        rule.load_state_dict(type(rule)().state_dict())
        for t in range(2):
            step(model, rule, lambda m: m(**words(), use_cache=False).loss, optimizer, t)
        grads.append([p.grad.clone() for p in trained(model) if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0 and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_move_along_the_momentum() -> None:
    """ε = −ρ v/‖v‖ / ḡ with v = s (m_B A + B m_A), by the numbers."""
    model, rule = linears(fb.LoRA(rank=2, alpha=3.0)), fb.MGPO(rho=0.2, beta=0.9)
    p, s = tensors(model), 1.5
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    norms = []
    for t in range(2):
        before = {k: v.detach().clone() for k, v in p.items()}
        step(model, rule, squared, optimizer, t)
        norms.append(float((s * (p["B"].grad @ before["A"] + before["B"] @ p["A"].grad)).norm()))
    assert rule.gradients["0.default"] == pytest.approx(0.9 * norms[0] + 0.1 * norms[1], rel=1e-4)
    still = model[0](X).detach()
    rule.before_forward(fb.Run(model, dict(fb.hosts(model)), optimizer, 2, 10))
    m = {k: optimizer.state[p[k]]["exp_avg"] for k in ("A", "B")}
    v = s * (m["B"] @ p["A"] + p["B"] @ m["A"]).detach()
    epsilon = -0.2 * v / v.norm() * min(1 / rule.gradients["0.default"], 10.0)
    torch.testing.assert_close(model[0](X).detach() - still, X @ epsilon.T, rtol=1e-4, atol=1e-5)


def test_an_optimizer_without_momentum_is_told() -> None:
    model, rule = linears(fb.LoRA(rank=2)), fb.MGPO()
    optimizer = torch.optim.SGD(trained(model), lr=0.01)
    step(model, rule, squared, optimizer, 0)
    with pytest.raises(ValueError, match="keeps none in floats"):
        step(model, rule, squared, optimizer, 1)
    step(model, rule, squared, torch.optim.SGD(trained(model), lr=0.01, momentum=0.9), 0)
