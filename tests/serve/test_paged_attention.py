"""Attention over pages: native code against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from finebits.kernels.cpu import paged

if paged.body() is None:
    pytest.skip("the CPU kernels are not compiled, or were before they had this", allow_module_level=True)


def expected(q: Tensor, store: Tensor, table: Tensor, lengths: Tensor, window: int | None, scale: float) -> Tensor:
    """Request by request, head by head, in float64."""
    out = torch.empty_like(q)
    group = q.shape[1] // store.shape[3]
    for r, length in enumerate(lengths.tolist()):
        k, v = (store[table[r], i].flatten(0, 1)[:length].double() for i in (0, 1))
        begin = 0 if window is None else max(0, length - window)
        for h in range(q.shape[1]):
            p = torch.softmax(scale * k[begin:, h // group] @ q[r, h].double(), 0)
            out[r, h] = p @ v[begin:, h // group]
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(("heads", "kv", "width"), [(9, 3, 64), (4, 4, 12), (6, 1, 80), (2, 1, 7)])
def test_it_is_softmax_over_the_tokens_that_are_seen(heads: int, kv: int, width: int, window: int | None) -> None:
    gen, tokens = torch.Generator().manual_seed(0), 16
    pages = torch.randn(9, 2 * tokens * kv * width + 5, generator=gen)  # numbers that belong to nobody at the end of each
    store = pages[:, : 2 * tokens * kv * width].view(9, 2, tokens, kv, width)
    table, lengths = torch.tensor([[3, 0, 8], [1, 0, 0], [7, 5, 0]]), torch.tensor([48, 1, 19])
    q = torch.randn(heads, 3, width, generator=gen).transpose(0, 1)
    assert paged.takes(q, store)
    for scale in (None, 0.3):
        out = paged.attend(q, store, table, lengths, window, scale)
        assert torch.allclose(out, expected(q, store, table, lengths, window, scale or 1 / math.sqrt(width)), atol=2e-6)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    gen = torch.Generator().manual_seed(1)
    store, q = torch.randn(6, 2, 16, 2, 32, generator=gen), torch.randn(3, 4, 32, generator=gen)
    table, lengths = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([32, 3, 20])
    both = paged.attend(q, store, table, lengths, None, None)
    for r in range(3):
        assert torch.equal(both[r : r + 1], paged.attend(q[r : r + 1], store, table[r : r + 1], lengths[r : r + 1], None, None))


def test_what_is_no_number_stays_with_its_request() -> None:
    store = torch.zeros(2, 2, 16, 1, 8)
    store[1, 0, 3] = math.nan
    out = paged.attend(torch.ones(2, 1, 8), store, torch.tensor([[0], [1]]), torch.tensor([5, 5]), None, None)
    assert torch.isfinite(out[0]).all() and torch.isnan(out[1]).all()
    before = paged.attend(torch.ones(1, 1, 8), store, torch.tensor([[1]]), torch.tensor([3]), None, None)
    assert torch.isfinite(before).all()  # it is behind what is seen
