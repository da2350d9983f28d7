"""LaMDA++: ranks by the spectra of the weights.  Azizi et al., EMNLP 2024.  arXiv:2406.12832v1.
Use it where no rows may be looked at: ranks follow the spectra of the weights.

E_l(r) = Σ_{i≤r} σ_i² / Σ_i σ_i² of the layer's weight; the more of its energy lies outside the first r0 directions, the larger its rank, out
of a small set, under a total. No data is needed. Here as a menu:

    loss_l(r) = (1 − E_l(r0)) · r0 / r        so that the best ranks grow with the root of 1 − E_l(r0)

Deviations: the paper's assignment of ranks to layers under the total could not be read in detail; the loss above is the simplest one whose
solution spends the total and is monotone in the energy, and it is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from finebits.linalg import top_svd
from finebits.plan.base import Option
from finebits.ranks import base
from finebits.stats.base import Stats


@dataclass(frozen=True)
class LaMDAPP(base.Ranking):
    """`factors` times the adapter's rank is the set of ranks.

    >>> planner = fb.LaMDAPP()
    >>> menu = planner.menu({"a": 0.9, "b": 0.1, "c": 0.1}, fb.LoRA(rank=4))  # the energy outside of four directions
    >>> {name: o.bytes for name, o in planner(menu, 12).items()}
    {'a': 8, 'b': 2, 'c': 2}
    """

    factors: tuple[float, ...] = (0.5, 1.0, 2.0)

    def score(self, W: Float[Tensor, "m n"], adapter: Any, stats: Stats) -> float:
        """1 − E_l(r0) of a weight.

        >>> round(fb.LaMDAPP().score(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), fb.LoRA(rank=1), {}), 4)  # 1² of 3² + 1²
        0.1
        """
        return outside(W, adapter.rank)

    def menu(self, outside: Mapping[str, float], adapter: Any, price: base.Price = base.units) -> dict[str, list[Option]]:
        """1 − E_l(r0) by module (`outside`) as options. The budget is then adapter.rank · len(outside).

        >>> [(o.bytes, o.loss) for o in fb.LaMDAPP().menu({"a": 0.8}, fb.LoRA(rank=4))["a"]]  # .8 · 4 / r
        [(2, 1.6), (4, 0.8), (8, 0.4)]
        """
        ranks = sorted({max(1, round(f * adapter.rank)) for f in self.factors})
        return base.menu({name: {r: e * adapter.rank / r for r in ranks} for name, e in outside.items()}, adapter, price)


def outside(W: Float[Tensor, "m n"], rank: int) -> float:
    """1 − E(rank): the share of W's energy outside its first directions.

    >>> round(outside(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1), 4)  # 1² of 3² + 1²
    0.1
    """
    return 1.0 - top_svd(W, rank).captured
