"""TIES-Merging: Alg. 1 by hand, and PEFT's own functions."""

from __future__ import annotations

import torch
from peft.utils import merge_utils

from finebits.merging.base import Factors
from finebits.merging.ties import TIES, trim

GEN = torch.Generator()


def drawn(seed: int, r: int = 4) -> Factors:
    gen = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(24, r, generator=gen), torch.randn(r, 17, generator=gen), 0.5 + seed)


def test_the_three_steps_of_the_algorithm() -> None:
    tau = torch.tensor([[5.0, -1.0, 2.0, 0.3, -4.0], [3.0, 2.0, -6.0, 0.2, -0.1], [-1.0, 0.5, 1.0, 4.0, -2.0]])
    # trim to 60 %: 3 of 5 entries each; elect + − … by sums 8, 2, −4, 4, −6; mean of those that agree
    merged = TIES(density=0.6)._merge(tau, torch.ones(3))
    assert torch.equal(merged, torch.tensor([4.0, 2.0, -6.0, 4.0, -3.0]))


def test_one_alone_at_full_density_is_itself() -> None:
    f = drawn(1)
    merged = TIES(density=1.0)([f], [1.0], GEN)
    assert torch.allclose(merged.B @ merged.A, f.s * f.B @ f.A, atol=1e-5)


def test_what_is_trimmed_are_the_smallest() -> None:
    t = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    kept = trim(t, 0.3)
    assert int((kept != 0).sum()) == int(0.3 * 63) and t[kept == 0].abs().max() <= kept[kept != 0].abs().min()


def test_it_is_what_peft_computes() -> None:
    each, weights = [drawn(1), drawn(2), drawn(3)], [0.7, 0.4, 1.1]
    merged = TIES(density=0.4)(each, weights, GEN)
    roots = torch.tensor([(w * f.s) ** 0.5 for f, w in zip(each, weights, strict=True)])
    assert torch.allclose(merged.A, merge_utils.ties([f.A for f in each], roots, 0.4), atol=1e-6)
    assert torch.allclose(merged.B, merge_utils.ties([f.B for f in each], roots, 0.4), atol=1e-6)
