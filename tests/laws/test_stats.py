"""Laws of a statistic: a monoid over a stream of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finebits.stats.base import Statistic
from variants import methods

every = pytest.mark.parametrize("cls", methods("stats"))
T, N, M = 23, 7, 5


def stream(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    return torch.randn(T, N, generator=gen).to(dtype), torch.randn(T, M, generator=gen).to(dtype)


def take(cls: type[Statistic], x: torch.Tensor, g: torch.Tensor, *cuts: int) -> Statistic:
    """The statistic of a stream handed over in pieces."""
    s = cls()
    ends = [0, *sorted(cuts), len(x)]
    for a, b in zip(ends, ends[1:], strict=False):
        s.add(x[a:b], g[a:b] if cls.backward else None)
    return s


def same(a: Statistic, b: Statistic) -> None:
    assert a.tokens == b.tokens
    torch.testing.assert_close(a.value(), b.value(), rtol=1e-5, atol=1e-6)


def test_folder_is_not_empty() -> None:
    assert methods("stats")


@given(st.sampled_from(methods("stats")), st.lists(st.integers(0, T), max_size=4))
def test_a_stream_may_be_cut_anywhere(cls: type[Statistic], cuts: list[int]) -> None:
    x, g = stream()
    same(take(cls, x, g, *cuts), take(cls, x, g))


@given(st.sampled_from(methods("stats")), st.integers(1, T - 1))
def test_merging_is_reading_both(cls: type[Statistic], cut: int) -> None:
    x, g = stream()
    first, second = take(cls, x[:cut], g[:cut]), take(cls, x[cut:], g[cut:])
    kept = first.value().clone()
    same(first.merge(second), take(cls, x, g))
    same(second.merge(first), take(cls, x, g))
    assert torch.equal(first.value(), kept), "merge must not write into its arguments"


@every
def test_nothing_read_is_neutral(cls: type[Statistic]) -> None:
    x, g = stream()
    s = take(cls, x, g)
    same(cls().merge(s), s)
    same(s.merge(cls()), s)
    assert cls().merge(cls()).tokens == 0
    with pytest.raises(ValueError, match="no tokens"):
        cls().value()


@every
def test_a_merged_statistic_is_its_own(cls: type[Statistic]) -> None:
    x, g = stream()
    s = take(cls, x, g)
    value = s.value().clone()
    for copy in (cls().merge(s), s.merge(cls())):
        copy.add(x, g if cls.backward else None)
        assert torch.equal(s.value(), value)


@every
def test_the_order_of_tokens_does_not_matter(cls: type[Statistic]) -> None:
    x, g = stream()
    order = torch.randperm(T)
    same(take(cls, x[order], g[order]), take(cls, x, g))


@every
def test_value_is_a_mean(cls: type[Statistic]) -> None:
    x, g = stream()
    twice = take(cls, torch.cat([x, x]), torch.cat([g, g]))
    assert twice.tokens == 2 * T
    torch.testing.assert_close(twice.value(), take(cls, x, g).value(), rtol=1e-5, atol=1e-6)


@every
def test_low_precision_is_summed_in_float32(cls: type[Statistic]) -> None:
    x, g = stream(torch.bfloat16)
    s = take(cls, x, g, 3, 9)
    assert s.value().dtype == torch.float32
    same(s, take(cls, x.float(), g.float()))


@every
def test_gradients_are_asked_for_where_they_are_needed(cls: type[Statistic]) -> None:
    x, _ = stream()
    if cls.backward:
        with pytest.raises(ValueError, match=cls.__name__):
            cls().add(x, None)
    else:
        cls().add(x, None)
