"""DARE: what is dropped is made up for in the mean (section 3.2), by a seed, and PEFT draws the same from the same stream."""

from __future__ import annotations

import torch
from peft.utils import merge_utils

from finebits.merging.base import Factors
from finebits.merging.dare import DARE


def drawn(seed: int, r: int = 4) -> Factors:
    gen = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(24, r, generator=gen), torch.randn(r, 17, generator=gen), 0.5 + seed)


def test_the_mean_over_draws_is_the_task_vector() -> None:
    f, total, gen = drawn(1), 0.0, torch.Generator().manual_seed(0)
    for _ in range(400):
        total = total + DARE(density=0.25)([f], [1.0], gen).A / 400
    wanted = f.s**0.5 * f.A
    assert float((total - wanted).norm() / wanted.norm()) < 4 * (3 / 400) ** 0.5  # an entry's deviation is √((1 − p)/p) = √3 of itself


def test_a_seed_is_a_result() -> None:
    each = [drawn(1), drawn(2)]
    draw = lambda seed: DARE()(each, [1.0, 1.0], torch.Generator().manual_seed(seed)).A  # noqa: E731
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_full_density_is_the_plain_sum() -> None:
    f = Factors(torch.ones(2, 1), torch.ones(1, 2))
    assert torch.equal(DARE(density=1.0)([f], [1.0], torch.Generator()).A, f.A)


def test_it_is_what_peft_computes() -> None:
    each, weights = [drawn(1), drawn(2)], [0.7, 0.4]
    merged = DARE(density=0.4)(each, weights, torch.Generator().manual_seed(5))
    roots = torch.tensor([(w * f.s) ** 0.5 for f, w in zip(each, weights, strict=True)])
    torch.manual_seed(5)
    assert torch.allclose(merged.A, merge_utils.dare_linear([f.A for f in each], roots, 0.4), atol=1e-6)
    assert torch.allclose(merged.B, merge_utils.dare_linear([f.B for f in each], roots, 0.4), atol=1e-6)
