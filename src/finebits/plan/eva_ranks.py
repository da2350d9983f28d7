"""EVA's redistribution of ranks (Alg. 1, line 8).  Paischer et al., 2024.  arXiv:2410.07170v4.

With ξ_lj the share of the energy of layer l's inputs in direction j, the budget of Σ r ranks goes to the largest ξ of all layers, at most
round(ρ·r) to a layer; a layer that gets none loses its adapter. As a menu: rank r of layer l loses Σ_{j>r} ξ_lj and costs r, and since ξ
falls with j the hulls' steps are the pooled sorting itself.
Deviations: `price` may count what a rank really takes instead of one for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finebits.plan import _ranks
from finebits.plan._knapsack import hull
from finebits.plan.base import Option


@dataclass(frozen=True)
class EVARanks:
    """At most `rho` times the adapter's rank to one module; 1 leaves every rank as it is."""

    rho: float = 2.0

    def menu(self, shares: Mapping[str, Sequence[float]], adapter: Any, price: _ranks.Price = _ranks.units) -> dict[str, list[Option]]:
        """ξ by module, descending (`finebits.init.eva.explained`), as options. The budget is then adapter.rank · len(shares)."""
        most = max(1, round(self.rho * adapter.rank))
        return _ranks.menu({name: _ranks.leftover([float(x) for x in s][:most]) for name, s in shares.items()}, adapter, price)

    def __call__(self, menu: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
        return hull(menu, budget)
