"""Natural GaLore: the dense damped inverse, GaLore where damping is large, and a history that lasts as long as its basis."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finebits.optim.galore import GaLore
from finebits.optim.natural_galore import NaturalGaLore, natural


@pytest.mark.parametrize("history, length", [(1, 0.03), (5, 100.0), (20, 0.03), (20, 100.0), (80, 0.03)])  # of columns of 64 numbers
def test_is_the_dense_inverse(history: int, length: float) -> None:
    gen, damping = torch.Generator().manual_seed(0), 1e-3
    state = {"H": torch.zeros(history, 64), "HH": torch.zeros(history, history), "seen": 0}
    columns: list[torch.Tensor] = []
    for _ in range(history + 3):
        R = torch.randn(4, 16, generator=gen) * length / 8
        columns = [*columns, R.flatten().double()][-history:]
        ours = natural(R, damping, state)
        H = torch.stack(columns, 1)
        dense = torch.linalg.solve(damping * torch.eye(64).double() + H @ H.T, columns[-1]) * damping
        assert (ours.flatten() - dense).norm() < (1e-5 if length < 1 else 1e-4) * dense.norm()


def run(kind: GaLore | NaturalGaLore) -> tuple[torch.Tensor, dict]:
    gen, p = torch.Generator().manual_seed(0), nn.Parameter(torch.ones(6, 9))
    optimizer = kind.make([{"params": [p], "weight_decay": 0.0}], lr=0.1)
    for _ in range(8):
        p.grad = torch.randn(6, 9, generator=gen)
        optimizer.step()
    return p.detach(), optimizer.state[p]


def test_is_galore_where_damping_is_large() -> None:
    galore, _ = run(GaLore(rank=2, gap=3))
    assert torch.allclose(run(NaturalGaLore(rank=2, gap=3, damping=1e8))[0], galore, atol=1e-5)
    assert not torch.allclose(run(NaturalGaLore(rank=2, gap=3, damping=1e-3))[0], galore, atol=1e-2)


def test_history_goes_with_its_basis() -> None:
    _, state = run(NaturalGaLore(rank=2, gap=3, history=5))
    assert state["transform.svds"] == 3 and state["transform.seen"] == 2  # steps 6 and 7
    H = state["transform.H"]
    assert H[:2].norm(dim=1).min() > 0 and not H[2:].any()
    assert torch.allclose(state["transform.HH"], H @ H.T)


def test_damping_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="damping above 0 and a history of 1 or more; got 0 and 20"):
        NaturalGaLore(damping=0)
