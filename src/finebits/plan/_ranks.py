"""Ranks as a menu: what planners that give every module its rank share. The budget is a number of ranks, or whatever `price` counts.

Those that go by a module's weight and by what its inputs were can give ranks out before any bits are chosen (`adapter.ranks` in a recipe).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

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


def comparable(menu: Mapping[str, Sequence[Option]]) -> dict[str, list[Spec]]:
    """The specs of a menu as several modules may share them: without adapters, unless these are a part of the choice."""
    varied = any(len({o.spec.adapter for o in options}) > 1 for options in menu.values())
    return {name: [o.spec if varied else replace(o.spec, adapter=None) for o in options] for name, options in menu.items()}


def units(name: str, rank: int) -> int:
    """A rank costs one, wherever it is."""
    return rank


def of_rank(adapter: Any, rank: int) -> Any:
    """The adapter at another rank with the same scale s (alpha moves along); none at rank 0.

    >>> of_rank(fb.LoRA(rank=16, alpha=32), 8)
    LoRA(rank=8, alpha=16.0, scaling='lora')
    """
    if rank == 0:
        return None
    grown = (rank / adapter.rank) ** (0.5 if getattr(adapter, "scaling", "") == "rslora" else 1.0)
    return replace(adapter, rank=rank, **({"alpha": adapter.alpha * grown} if hasattr(adapter, "alpha") else {}))


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
