"""Q-GaLore: GaLore without its savings, a basis of 4 bits, and searches that grow seldom where subspaces stay, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits.optim import q_galore
from finebits.optim._shell import made
from finebits.optim.galore import GaLore
from finebits.optim.q_galore import QGaLore


def run(kind: Any, gradients: list[Tensor]) -> tuple[Tensor, dict]:
    p = nn.Parameter(torch.ones_like(gradients[0]))
    optimizer = kind.make([{"params": [p], "weight_decay": 0.0}], lr=0.1)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p]


def gradients(m: int, n: int, count: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(m, n, generator=gen) for _ in range(count)]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_without_its_savings_it_is_galore(shape: tuple[int, int]) -> None:
    Gs = gradients(*shape, 9)
    ours, _ = run(QGaLore(rank=2, gap=3, bits=None, threshold=2.0, inner="adamw"), Gs)
    assert torch.equal(ours, run(GaLore(rank=2, gap=3), Gs)[0])


def test_a_basis_of_four_bits_is_as_near_as_its_steps() -> None:
    """And gives nearly the updates of GaLore."""
    Gs = gradients(48, 80, 4)
    ours, state = run(QGaLore(rank=16, inner="adamw"), Gs)
    wanted, exact = run(GaLore(rank=16), Gs)
    P, held = exact["transform.P"], QGaLore(rank=16).held(48, {k.removeprefix("transform."): v for k, v in state.items()})
    assert held is not None and state["transform.P.codes"].nbytes == 48 * 16 // 2
    step = state["transform.P.scale"].T.expand(-1, 256).reshape(48, 16)
    assert ((held - P).abs() <= step * 1.001).all()  # half a step, and where the zero point was rounded away from an end half of one more
    assert (ours - wanted).norm() < 0.3 * (wanted - 1).norm()


def searches(kind: QGaLore, steps: int, gradient: Any, start: dict | None = None) -> dict:
    state: dict = {}
    for t in range(steps):
        kind.before(gradient(t), state)
    return state


def stationary(t: int) -> Tensor:
    """One subspace, other weights in it, and a little noise."""
    gen = torch.Generator().manual_seed(t)
    U = torch.linalg.qr(torch.randn(24, 3, generator=torch.Generator().manual_seed(9))).Q
    return U @ torch.randn(3, 30, generator=gen) + 1e-3 * torch.randn(24, 30, generator=gen)


@pytest.mark.parametrize("clear, count, gap", [(True, 17, 32), (False, 10, 128)])
def test_searches_of_a_subspace_that_stays(clear: bool, count: int, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 without laziness; signs of the vectors turned at random change nothing."""
    fixed = [stationary(t) for t in range(7)]
    kind = QGaLore(rank=3, gap=4, clear=clear)
    state = searches(kind, 200, lambda t: fixed[t % 7])
    assert (state["svds"], state["gap"]) == (count, gap)
    gen, plain = torch.Generator().manual_seed(1), q_galore.leading
    monkeypatch.setattr(q_galore, "leading", lambda *a: plain(*a) * torch.randn(3, generator=gen).sign())
    assert searches(kind, 200, lambda t: fixed[t % 7])["svds"] == count


@pytest.mark.parametrize("rank", [1, 4])
def test_where_subspaces_change_none_is_kept_longer(rank: int) -> None:
    fresh = gradients(20, 30, 60)
    assert searches(QGaLore(rank=rank, gap=2), 60, lambda t: fresh[t])["gap"] == 2


def test_a_gap_ends_at_the_longest() -> None:
    fixed = stationary(0)
    state = searches(QGaLore(rank=3, gap=2, longest=5), 80, lambda t: fixed)
    assert state["gap"] == 5
    with pytest.raises(ValueError, match="longest of gap or more; got 5, 10 and a gap of 20"):
        QGaLore(gap=20, longest=10)


def test_over_weights_of_eight_bits_that_need_no_rounding_it_is_galore() -> None:
    """Whole numbers, one step of the codes apart: what GaLore gives is on the grid."""
    W = torch.randint(-9, 10, (4, 6), generator=torch.Generator().manual_seed(2)).float()
    W[:, 0] = 127.0  # stays, and with it the scale of a row
    G = torch.outer(torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.tensor([0.0, 1.0, -2.0, 1.0, 0.0, 2.0]))
    coded, exact = nn.Parameter(fb.quantize(W, fb.Int(8, block="row"))), nn.Parameter(W.clone())
    settings = {"rank": 1, "scale": 1.0, "inner": "sgd"}
    ours = made(QGaLore(bits=None, **settings), [{"params": [coded], "weight_decay": 0.0}], lr=1.0, seed=3)
    theirs = GaLore(**settings).make([{"params": [exact], "weight_decay": 0.0}], lr=1.0)
    for _ in range(3):
        coded.grad, exact.grad = G.clone(), G.clone()
        ours.step()
        theirs.step()
    assert torch.allclose(coded.dequantize().detach(), exact.detach().round(), atol=1e-4)
    assert torch.allclose(exact.detach(), W - 3 * G, atol=1e-4)
