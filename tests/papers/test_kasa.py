"""KaSA: the r smallest components are gone, whichever side is longer."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.adapters.base import Base
from finebits.init.kasa import KaSA


@pytest.mark.parametrize("shape", [(19, 43), (43, 19)], ids=str)
def test_the_smallest_components_are_dropped(shape: tuple[int, int]) -> None:
    W, adapter = torch.randn(shape), fb.Gated(rank=4, alpha=9.0)
    base, start = KaSA()(W, adapter, lambda V: V, {})
    S = torch.linalg.svdvals(W)
    assert torch.linalg.matrix_rank(base, rtol=1e-4) == 15
    assert (W - base).square().sum() == pytest.approx(float(S[-4:].square().sum()), rel=1e-4)
    p = adapter.params(Base(base), torch.Generator().manual_seed(0), start)
    assert torch.equal(adapter.merged(p, base), base) and p["gate"].unique().numel() == 4


def test_an_adapter_without_gates_cannot_take_it() -> None:
    base, start = KaSA()(torch.randn(9, 12), fb.LoRA(rank=2), lambda V: V, {})
    with pytest.raises(ValueError, match="no parameter 'gate'"):
        fb.LoRA(rank=2).params(Base(base), torch.Generator(), start)
