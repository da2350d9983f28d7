"""Laws of a pruner: what an entry is worth is a number, the same from the same seed, whatever lies beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import finebits as fb
from variants import methods, variants

every = pytest.mark.parametrize("pruner", [v for cls in methods("pruners") for v in variants(cls)], ids=str)


def seen(pruner: Any, columns: torch.Tensor | None = None) -> Any:
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(1))
    made = {S: S() for S in pruner.needs}
    for statistic in made.values():
        statistic.add(x if columns is None else x[:, columns])
    return made


def scores(pruner: Any, W: torch.Tensor, stats: Any, seed: int = 3) -> torch.Tensor:
    return pruner(W, stats, torch.Generator().manual_seed(seed))


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_entry_is_worth_a_number(pruner: Any, dtype: torch.dtype) -> None:
    W = weight(dtype)
    S = scores(pruner, W, seen(pruner))
    assert S.shape == W.shape and S.dtype == torch.float32 and bool(S.isfinite().all()) and float(S.min()) >= 0
    assert torch.equal(W, weight(dtype)) and torch.equal(S, scores(pruner, W, seen(pruner)))


@every
def test_order_is_no_matter(pruner: Any) -> None:
    if pruner == fb.Random():
        assert not torch.equal(scores(pruner, weight(), {}), scores(pruner, weight(), {}, seed=4))
        return
    rows, columns = torch.tensor([2, 0, 4, 1, 3]), torch.tensor([6, 0, 3, 1, 5, 2, 4])
    S = scores(pruner, weight(), seen(pruner))
    assert torch.equal(scores(pruner, weight()[rows][:, columns], seen(pruner, columns)), S[rows][:, columns])


@every
def test_what_it_needs_is_asked_for(pruner: Any) -> None:
    if pruner.needs:
        with pytest.raises(ValueError, match="needs"):
            scores(pruner, weight(), {})
