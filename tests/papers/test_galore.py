"""GaLore: as its algorithm says, SGD where nothing is lost, updates of the rank, searches that find the same, and gradients without a basis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finebits.optim._projected import leading
from finebits.optim.galore import GaLore


def run(kind: GaLore, W: Tensor, gradients: list[Tensor], lr: float = 0.1) -> tuple[list[Tensor], dict]:
    """The weight after every step, and the state after the last."""
    p, after = nn.Parameter(W.clone()), []
    optimizer = kind.make([{"params": [p], "weight_decay": 0.0}], lr=lr)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
        after.append(p.detach().clone())
    return after, optimizer.state[p]


def gradients(m: int, n: int, count: int, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=gen) for _ in range(count)]


def algorithm(W: Tensor, Gs: list[Tensor], r: int, T: int, alpha: float, lr: float) -> Tensor:
    """Algorithm 2 in float64, with the SVD of the shorter side and signs fixed; ε after the correction of bias."""
    W, wide = W.double(), W.shape[0] < W.shape[1]
    M = V = torch.zeros(())
    P = torch.zeros(())
    for t, G in enumerate(Gs):
        G = G.double() if wide else G.double().T
        if t % T == 0:
            P = torch.linalg.svd(G).U[:, :r]
            P = P * P.gather(0, P.abs().argmax(0, keepdim=True)).sign()
        R = P.T @ G
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = P @ ((M / (1 - 0.9 ** (t + 1))) / ((V / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8))
        W = W - lr * alpha * (N if wide else N.T)
    return W


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("search", ["exact", "randomised"])
def test_is_the_algorithm(shape: tuple[int, int], search: str) -> None:
    W, Gs = torch.ones(shape), gradients(*shape, 8)
    after, state = run(GaLore(rank=2, gap=3, scale=0.5, search=search), W, Gs)  # type: ignore[arg-type]
    assert torch.allclose(after[-1].double(), algorithm(W, Gs, 2, 3, 0.5, 0.1), atol=1e-5)
    assert state["transform.svds"] == 3


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_is_sgd_where_the_basis_holds_all_of_the_gradient(shape: tuple[int, int]) -> None:
    m, n = shape
    fixed = torch.linalg.qr(torch.randn(min(m, n), 2, generator=torch.Generator().manual_seed(1))).Q
    Gs = [fixed @ G for G in gradients(2, n, 6)] if m < n else [G @ fixed.T for G in gradients(m, 2, 6)]
    after, _ = run(GaLore(rank=2, gap=4, scale=1.0, inner="sgd"), torch.ones(shape), Gs)
    assert torch.allclose(after[-1], 1 - 0.1 * sum(Gs), atol=1e-6)


def test_a_step_has_the_rank_and_a_run_that_of_all_its_bases() -> None:
    after, state = run(GaLore(rank=2, gap=3), torch.zeros(12, 10), gradients(12, 10, 8))
    steps = [a - b for a, b in zip(after[1:], after, strict=False)]
    for change, rank in [(d, 2) for d in steps] + [(after[-1], 2 * state["transform.svds"])]:
        S = torch.linalg.svdvals(change)
        assert S[rank:].max() < 1e-5 * S[0] < S[rank - 1]


def spectrum(seed: int, m: int = 220, n: int = 300) -> Tensor:
    """Singular values that fall slowly, as gradients' do."""
    gen = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(k, m, generator=gen)).Q for k in (m, n))
    return U * (1 / torch.arange(1, m + 1).float().sqrt()) @ V.T


def energy(P: Tensor, G: Tensor) -> float:
    return float((P.T @ G).square().sum())


def test_searches_find_what_the_svd_finds() -> None:
    G = spectrum(0)
    exact = leading(G, 16, "exact", None, {"steps": 0})
    found = leading(G, 16, "randomised", None, {"steps": 0})
    assert energy(found, G) > 0.97 * energy(exact, G)
    warm = leading(spectrum(1), 16, "warm", None, {"steps": 0})  # of another gradient
    for _ in range(12):
        warm = leading(G, 16, "warm", warm, {"steps": 0})
    assert energy(warm, G) > 0.97 * energy(exact, G)
    for P in (exact, found, warm):
        assert torch.allclose(P.T @ P, torch.eye(16), atol=1e-5)
    near = leading(G + 1e-3 * spectrum(2), 16, "warm", warm, {"steps": 0})
    assert (near.T @ warm).diagonal().min() > 0.9  # vector by vector: what moments mean stays


def test_a_gradient_that_is_not_finite_gives_no_basis() -> None:
    Gs = gradients(6, 8, 5)
    broken = [*Gs[:2], Gs[2] * torch.nan, *Gs[3:]]
    _, state = run(GaLore(rank=2, gap=2, inner="sgd"), torch.zeros(6, 8), broken)
    assert state["transform.svds"] == 2 and state["transform.found"] == 3  # asked again a step later
    assert torch.isfinite(state["transform.P"]).all()
    with pytest.raises(ValueError, match=r"first gradient of a weight \(6, 8\) holds NaN or Inf"):
        run(GaLore(rank=2), torch.zeros(6, 8), broken[2:])
