"""DARE before TIES: the one without the other at full density, and PEFT's own function."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

from finebits.errors import Invalid
from finebits.merging.base import Factors
from finebits.merging.dare_ties import DARETIES
from finebits.merging.ties import TIES


def drawn(seed: int, r: int = 4) -> Factors:
    gen = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(24, r, generator=gen), torch.randn(r, 17, generator=gen), 0.5 + seed)


def test_at_full_density_it_is_ties() -> None:
    each = [drawn(1), drawn(2), drawn(3)]
    ours, theirs = (way([*each], [0.7, 0.4, 1.1], torch.Generator()) for way in (DARETIES(density=1.0), TIES(density=1.0)))
    assert torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B)


def test_it_is_what_peft_computes() -> None:
    each, weights = [drawn(1), drawn(2)], [0.7, 0.4]
    merged = DARETIES(density=0.4)(each, weights, torch.Generator().manual_seed(5))
    roots = torch.tensor([(w * f.s) ** 0.5 for f, w in zip(each, weights, strict=True)])
    torch.manual_seed(5)
    assert torch.allclose(merged.A, merge_utils.dare_ties([f.A for f in each], roots, 0.4), atol=1e-6)
    assert torch.allclose(merged.B, merge_utils.dare_ties([f.B for f in each], roots, 0.4), atol=1e-6)


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(Invalid, match="density is 0"):
        DARETIES(density=0.0)
