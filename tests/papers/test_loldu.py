"""LoLDU: r numbers on the diagonal of an LU decomposition."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.adapters.base import Base
from golden.values import golden


@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
def test_the_factors_are_those_of_the_weight(shape: tuple[int, int]) -> None:
    W, adapter = torch.randn(shape), fb.LoLDU(rank=19, alpha=19.0)
    p = adapter.params(Base(W), torch.Generator(), {})
    D = torch.linalg.lu(W).U.diagonal()
    torch.testing.assert_close(p["B"] * D @ p["A"], W, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(p["A"][:, :19].diagonal(), torch.ones(19))
    assert torch.equal(adapter.merged(p, W), W) and adapter.size(*shape) == 19


def test_one_number_moves_the_weight_along_one_product() -> None:
    W, adapter = torch.randn(19, 43), fb.LoLDU(rank=5, alpha=15.0)
    p = adapter.params(Base(W), torch.Generator(), {})
    p["z"] = torch.eye(5)[3] * 0.25
    torch.testing.assert_close(adapter.merged(p, W) - W, 0.75 * torch.outer(p["B"][:, 3], p["A"][3]), rtol=1e-4, atol=1e-5)


def test_a_zero_pivot_leaves_finite_factors() -> None:
    W = torch.randn(9, 12)
    W[4] = 0
    p = fb.LoLDU(rank=9, alpha=9.0).params(Base(W), torch.Generator(), {})
    assert all(torch.isfinite(v).all() for v in p.values())
    assert torch.isfinite(fb.LoLDU(rank=4).params(Base(torch.zeros(9, 12)), torch.Generator(), {})["A"]).all()


def test_a_quantized_base_keeps_its_start() -> None:
    W, x = fb.quantize(torch.randn(19, 43), fb.NF(3, block=16)), torch.randn(4, 43)
    adapter = fb.LoLDU(rank=5, alpha=15.0)
    p = adapter.params(Base(W), torch.Generator(), {})
    assert torch.equal(adapter.forward(p, x, Base(W)), Base(W)(x))


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_the_authors_weight_when_the_diagonal_moves(name: str) -> None:
    """What they add to z is z here."""
    theirs, adapter = golden("loldu"), fb.LoLDU(rank=4, alpha=6.0)
    W = theirs[name]
    p = adapter.params(Base(W), torch.Generator(), {}) | {"z": theirs["step"][0]}
    torch.testing.assert_close(adapter.merged(p, W), theirs[f"{name}_moved"], rtol=0, atol=1e-5)
