"""SLoRA, IntTune, NLoRA and LaMDA: a trained matrix in the middle, and where it starts."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.adapters.base import Base
from finebits.init.lamda import LaMDA
from finebits.init.nlora import NLoRA


@pytest.mark.parametrize(("train", "size"), [("all", 5 * (19 + 43) + 25), ("core", 25), ("left", 19 * 5 + 25)])
def test_what_is_trained(train: str, size: int) -> None:
    assert fb.SLoRA(rank=5, train=train).size(19, 43) == size


def test_nystrom_is_exact_on_a_weight_of_the_rank() -> None:
    core = torch.linalg.qr(torch.randn(5, 5)).Q
    W = torch.cat([core, torch.randn(14, 5)]) @ torch.cat([torch.eye(5), torch.randn(5, 38)], 1)
    adapter = fb.SLoRA(rank=5, alpha=15.0)
    base, p = NLoRA()(W, adapter, lambda V: V, {})
    assert base.abs().max() < 1e-4
    torch.testing.assert_close(adapter.s * p["B"] @ p["N"] @ p["A"], W, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("middle", ["fit", "pinv", "corner"])
@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
def test_nystrom_starts_at_the_weight(middle: str, shape: tuple[int, int]) -> None:
    W, adapter = 0.02 * torch.randn(shape), fb.SLoRA(rank=5, alpha=15.0)
    base, p = NLoRA(middle=middle)(W, adapter, lambda V: V, {})
    torch.testing.assert_close(adapter.merged(p, base), W, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p["B"], W[:, :5])
    nothing, p = NLoRA(middle=middle)(torch.zeros(shape), adapter, lambda V: V, {})
    assert p == {} and not nothing.any()  # the adapter starts as it likes


def test_the_spectral_start_holds_the_principal_part() -> None:
    W, adapter = torch.randn(19, 43), fb.SLoRA(rank=5, alpha=15.0, train="left")
    base, start = LaMDA()(W, adapter, lambda V: V, {})
    p = adapter.params(Base(base), torch.Generator(), start)
    assert torch.linalg.matrix_norm(base, 2) == pytest.approx(float(torch.linalg.svdvals(W)[5]), rel=1e-4)
    torch.testing.assert_close(adapter.merged(p, base), W, rtol=1e-5, atol=1e-5)
    assert p["N"].diagonal().diff().max() <= 0
    assert adapter.frozen == {"A"}


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(Exception, match="train"):
        fb.SLoRA(train="right")
