"""LoRA-GA: the first step of SGD goes along the best rank-2r approximation of the gradient, whatever the size of the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import finebits as fb
from finebits.adapters.base import Base
from finebits.init.lora_ga import LoRAGA
from finebits.stats.grad import Grad
from golden.values import golden, signed
from papers.gram import seen

M, N, R = 37, 61, 6


def problem(size: float):  # noqa: ANN201
    """A linear regression: weight, inputs, targets, and the statistic that a backward pass gives."""
    W, X, Y = torch.randn(M, N), torch.randn(200, N), torch.randn(200, M)
    out = F.linear(X, W).requires_grad_()
    (size * 0.5 * (out - Y).square().sum()).backward()
    return W, X, Y, seen(X, out.grad, Grad)


def best(G: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(G.double())
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def first_step(W: Tensor, X: Tensor, Y: Tensor, base: Tensor, p: dict, adapter: fb.LoRA, size: float, lr: float) -> Tensor:
    """What one step of SGD on A and B does to the weight, in float64."""
    q = {k: v.double().requires_grad_() for k, v in p.items()}
    loss = size * 0.5 * (F.linear(X.double(), adapter.merged(q, base.double())) - Y).square().sum() / len(X)
    loss.backward()
    after = {k: (v - lr * v.grad).detach() for k, v in q.items()}
    return adapter.merged(after, base.double()) - adapter.merged({k: v.detach() for k, v in q.items()}, base.double())


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("alpha", [6.0, 20.0])
def test_theorem_3_1_first_step_is_best_rank_2r(size: float, alpha: float) -> None:
    W, X, Y, stats = problem(size)
    adapter = fb.LoRA(rank=R, alpha=alpha)
    base, p = LoRAGA()(W, adapter, lambda V: V, stats)
    target = best(stats[Grad].value(), 2 * R)
    step = first_step(W, X, Y, base, p, adapter, size, 1e-6 / size)
    assert F.cosine_similarity(step.flatten(), -target.flatten(), 0) >= 0.9999
    c2 = M**0.5 / 16
    torch.testing.assert_close(step, -1e-6 / size * adapter.s**2 * c2 * target, rtol=5e-3, atol=1e-9)


def test_the_error_is_of_first_order_in_the_learning_rate() -> None:
    W, X, Y, stats = problem(1.0)
    adapter = fb.LoRA(rank=R, alpha=R)
    base, p = LoRAGA()(W, adapter, lambda V: V, stats)
    wanted = -(adapter.s**2) * M**0.5 / 16 * best(stats[Grad].value(), 2 * R)
    off = [float((first_step(W, X, Y, base, p, adapter, 1.0, lr) / lr - wanted).norm() / wanted.norm()) for lr in (1e-1, 1e-2)]
    assert off[0] / off[1] == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_start_with_singular_values_in_one_factor_fails_the_theorem(size: float) -> None:
    """B = U Σ, A = Vᵀ on the same directions and a scale in B alone, as PEFT 0.21 has it: half of the directions are missing."""
    W, X, Y, stats = problem(size)
    G, adapter = stats[Grad].value(), fb.LoRA(rank=R, alpha=R)
    U, S, Vh = torch.linalg.svd(G)
    p = {"A": Vh[:R], "B": M**0.25 / 4 * U[:, R : 2 * R] * S[R : 2 * R]}
    step = first_step(W, X, Y, W - adapter.s * p["B"] @ p["A"], p, adapter, size, 1e-6 / size)
    assert F.cosine_similarity(step.flatten(), -best(G, 2 * R).flatten(), 0) < 0.97


def test_factors_are_of_one_length_and_orthogonal_sets() -> None:
    W, _, _, stats = problem(1.0)
    _, p = LoRAGA(gamma=4.0)(W, fb.LoRA(rank=R, alpha=20.0), lambda V: V, stats)
    c2 = M**0.5 / 4
    torch.testing.assert_close(p["A"] @ p["A"].mT, c2 * torch.eye(R), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(p["B"].mT @ p["B"], c2 * torch.eye(R), rtol=1e-4, atol=1e-4)
    assert (p["B"].mT @ stats[Grad].value() @ p["A"].mT).abs().max() < 1e-3


def test_the_gradient_of_a_quantized_base_is_that_of_its_dense_copy() -> None:
    x, g = torch.randn(30, N), torch.randn(30, M)
    W = fb.quantize(torch.randn(M, N), fb.NF(3, block=16))
    dense = W.dequantize().requires_grad_()
    F.linear(x, dense).backward(g)
    torch.testing.assert_close(seen(x, g, Grad)[Grad].value(), dense.grad / 30, rtol=1e-5, atol=1e-6)


def test_the_collector_gives_autograds_gradient_over_quantized_layers_and_uneven_batches() -> None:
    """Two quantized layers, micro-batches of 11 and 4 tokens: the mean over all 15 tokens, as on a dense copy."""
    make = lambda: torch.nn.Sequential(torch.nn.Linear(20, 13), torch.nn.GELU(), torch.nn.Linear(13, 7))  # noqa: E731
    net, dense = make(), make()
    for i in (0, 2):
        q = fb.quantize(torch.randn(net[i].weight.shape), fb.NF(4, block=16))
        net[i].weight = torch.nn.Parameter(q, requires_grad=False)
        dense[i].weight.data, dense[i].bias.data = q.dequantize(), net[i].bias.data
    batches = [(torch.randn(k, 20), torch.randn(k, 7)) for k in (11, 4)]
    loss = lambda m, b: (m(b[0]) - b[1]).square().sum()  # noqa: E731
    found = fb.collect(net, batches, loss, {"0": frozenset({Grad}), "2": frozenset({Grad})})
    (sum(loss(dense, b) for b in batches) / 15).backward()
    for name in ("0", "2"):
        torch.testing.assert_close(found[name][Grad].value(), dense[int(name)].weight.grad, rtol=1e-4, atol=1e-5)


def test_more_directions_than_the_matrix_has_and_no_gradient() -> None:
    W, adapter = torch.randn(5, N), fb.LoRA(rank=4, alpha=4.0)
    base, p = LoRAGA()(W, adapter, lambda V: V, seen(torch.randn(30, N), torch.randn(30, 5), Grad))
    full = adapter.params(Base(base), torch.Generator(), p)
    torch.testing.assert_close(adapter.merged(full, base), W, rtol=1e-5, atol=1e-5)
    for bad, message in ((torch.zeros(30, 5), "zero"), (torch.full((30, 5), torch.nan), "NaN"), (torch.randn(30, 6), "another module")):
        with pytest.raises(ValueError, match=message):
            LoRAGA()(W, adapter, lambda V: V, seen(torch.randn(30, N), bad, Grad))
    with pytest.raises(ValueError, match="LoRAGA needs Grad"):
        LoRAGA()(W, adapter, lambda V: V, {})


def test_the_authors_start() -> None:
    """Signs of singular vectors are free, and each direction is in A or B alone: with them taken over, factors and base are theirs."""
    theirs, adapter = golden("lora_ga"), fb.LoRA(rank=6, alpha=9.0)
    base, p = LoRAGA(gamma=4.0)(theirs["W"], adapter, lambda V: V, seen(torch.eye(40), 40 * theirs["G"].mT, Grad))
    A = signed(p["A"], theirs["A"])[:, None] * p["A"]
    B = signed(p["B"].mT, theirs["B"].mT) * p["B"]
    torch.testing.assert_close(A, theirs["A"], rtol=0, atol=1e-4)
    torch.testing.assert_close(B, theirs["B"], rtol=0, atol=1e-4)
    torch.testing.assert_close(base + adapter.s * p["B"] @ p["A"] - adapter.s * B @ A, theirs["base"], rtol=0, atol=1e-4)
