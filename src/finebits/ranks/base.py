"""Ranks as a menu: what planners that give every module its rank share. The budget is a number of ranks, or whatever `price` counts.

Those that go by a module's weight and by what its inputs were can give ranks out before any bits are chosen (`adapter.ranks` in a recipe).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import of_rank
from finebits.plan.base import Option, Spec
from finebits.stats.base import Statistic, Stats

Price = Callable[[str, int], int]


@runtime_checkable
class Ranking(Protocol):
    """A planner of ranks that goes by every module's own `score`."""

    needs: ClassVar[frozenset[type[Statistic]]]

    def score(self, W: Float[Tensor, "m n"], adapter: Any, stats: Stats) -> Any: ...

    def menu(self, scores: Mapping[str, Any], adapter: Any, price: Price = ...) -> dict[str, list[Option]]: ...

    def __call__(self, menu: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]: ...


def adapters(ranking: Ranking, scores: Mapping[str, Any], adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Every module's adapter, None at rank 0. No rank exceeds its matrix, and together they are no more than if all had the adapter's own."""
    fits = lambda o, shape: getattr(o.spec.adapter, "rank", 0) <= min(shape)  # noqa: E731
    menu = {name: [o for o in options if fits(o, shapes[name])] for name, options in ranking.menu(scores, adapter).items()}
    choice = ranking(menu, sum(min(adapter.rank, *shapes[name]) for name in menu))
    return {name: choice[name].spec.adapter for name in scores}


def units(name: str, rank: int) -> int:
    """A rank costs one, wherever it is."""
    return rank


def menu(losses: Mapping[str, Mapping[int, float]], adapter: Any, price: Price = units) -> dict[str, list[Option]]:
    """{module: {rank: loss}} -> options that differ in rank alone."""
    return {
        name: [Option(Spec(adapter=of_rank(adapter, r)), price(name, r), loss) for r, loss in by_rank.items()]
        for name, by_rank in losses.items()
    }


def leftover(gains: Sequence[float], least: int = 0) -> dict[int, float]:
    """Σ of the gains that rank r does not hold, for r from `least` to all of them.

    >>> leftover([0.5, 0.3])
    {0: 0.8, 1: 0.3, 2: 0.0}
    """
    total = sum(gains)
    found, held = {}, 0.0
    for r in range(len(gains) + 1):
        if r >= least:
            found[r] = max(total - held, 0.0)
        held += gains[r] if r < len(gains) else 0.0
    return found
