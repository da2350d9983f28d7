"""What gives every module its rank, before any bits are chosen (`adapter.ranks` in a recipe): scores of the modules become a menu of ranks, and
the budget is a number of ranks, or whatever `price` counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from finebits.adapters.base import of_rank
from finebits.plan.base import Option, Spec
from finebits.plan.knapsack import hull
from finebits.plan.planner import Menu, Solution
from finebits.stats.base import Statistic, Stats

Price = Callable[[str, int], int]
Batches = Sequence[Any]
Loss = Callable[[nn.Module, Any], Tensor]


@runtime_checkable
class Ranking(Protocol):
    """A frozen dataclass of settings. It goes by every module's own `score`, or, where it `searches`, by what training all of them shows."""

    needs: ClassVar[frozenset[type[Statistic]]] = frozenset()
    searches: ClassVar[bool] = False

    def score(self, W: Float[Tensor, "m n"], adapter: Any, stats: Stats) -> Any:
        """What a module's weight and inputs say."""
        ...

    def search(self, model: nn.Module, hosts: Mapping[str, Any], train: Batches, held: Batches, loss: Loss) -> dict[str, Any]:
        """The scores of a built model's `hosts`, whose adapters are trained on the way on the batches of `train`, and judged on `held`."""
        ...

    def menu(self, scores: Mapping[str, Any], adapter: Any, price: Price = ...) -> dict[str, list[Option]]: ...

    def __call__(self, menu: Menu, budget: int) -> Solution:
        return hull(menu, budget)

    def budget(self, adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """What may be given out: no more ranks than if every module had the adapter's own."""
        return sum(min(adapter.rank, *shape) for shape in shapes.values())


def adapters(ranking: Ranking, scores: Mapping[str, Any], adapter: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Every module's adapter, None at rank 0. No rank exceeds its matrix, and together they keep to the ranking's budget.

    >>> shares, shapes = {"a": [0.6, 0.3], "b": [0.2, 0.1]}, {"a": (8, 8), "b": (8, 8)}
    >>> {name: a and a.rank for name, a in adapters(fb.EVARanks(rho=2.0), shares, fb.LoRA(rank=1), shapes).items()}
    {'a': 2, 'b': None}
    """
    fits = lambda o, shape: o.spec.adapter is None or o.spec.adapter.rank <= min(shape)  # noqa: E731
    menu = {name: [o for o in options if fits(o, shapes[name])] for name, options in ranking.menu(scores, adapter).items()}
    choice = ranking(menu, ranking.budget(adapter, shapes))
    return {name: choice[name].spec.adapter for name in scores}


def units(name: str, rank: int) -> int:
    """A rank costs one, wherever it is."""
    return rank


def menu(losses: Mapping[str, Mapping[int, float]], adapter: Any, price: Price = units) -> dict[str, list[Option]]:
    """{module: {rank: loss}} -> options that differ in rank alone.

    >>> [(o.bytes, o.loss, o.spec.adapter and o.spec.adapter.rank) for o in menu({"a": {0: 0.5, 4: 0.0}}, fb.LoRA(rank=4))["a"]]
    [(0, 0.5, None), (4, 0.0, 4)]
    """
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
    left, captured = {}, 0.0
    for r in range(len(gains) + 1):
        if r >= least:
            left[r] = max(total - captured, 0.0)
        captured += gains[r] if r < len(gains) else 0.0
    return left
