"""EVA's redistribution of ranks (Alg. 1, line 8).  Paischer et al., 2024.  arXiv:2410.07170v4.
Use it with init eva: modules whose inputs need more directions get more rank, of the same sum.

With ξ_lj = σ_j² / ‖X_l‖² the share of the energy of layer l's inputs in direction j, the budget of Σ r ranks goes to the largest ξ of all
layers, at most round(ρ·r) to a layer; a layer that gets none loses its adapter, and α moves along so that s stays (the code's
adjust_scaling_factors). As a menu: rank r of layer l loses Σ_{j>r} ξ_lj and costs r, and since ξ falls with j the hulls' steps are the
pooled sorting itself.
Deviations: inputs are not centred, as in the paper's eq. 2 (the code subtracts a running mean); `price` may count what a rank really takes
instead of one for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.linalg import top_svd
from finebits.plan.base import Option
from finebits.ranks import base
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.gram import Gram


@dataclass(frozen=True)
class EVARanks(base.Ranking):
    """At most `rho` times the adapter's rank to one module; 1 leaves every rank as it is.

    >>> planner = fb.EVARanks(rho=2.0)
    >>> menu = planner.menu({"a": [0.6, 0.3], "b": [0.2, 0.1]}, fb.LoRA(rank=1))  # what directions explain of the inputs
    >>> {name: o.bytes for name, o in planner(menu, 2).items()}  # two ranks go where the largest two are
    {'a': 2, 'b': 0}
    """

    rho: float = 2.0
    needs: ClassVar[frozenset[type[Statistic]]] = frozenset({Gram})

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise Invalid(f"rho is {self.rho}; no module can get more than rho times the adapter's rank, so it is at least 1")

    def most(self, adapter: Any) -> int:
        """The largest rank that a module can get.

        >>> fb.EVARanks(rho=2.0).most(fb.LoRA(rank=8))
        16
        """
        return max(1, round(self.rho * adapter.rank))

    def score(self, W: Float[Tensor, "m n"], adapter: Any, stats: Stats) -> list[float]:
        """ξ of a module's inputs, descending, as far as it can get ranks.

        >>> gram = fb.Gram()
        >>> gram.add(torch.diag(torch.tensor([3.0, 1.0])))
        >>> [round(share, 4) for share in fb.EVARanks().score(torch.ones(2, 2), fb.LoRA(rank=8), {fb.Gram: gram})]  # 9 and 1 of 10
        [0.9, 0.1]
        """
        return explained(need(stats, Gram, "EVARanks"), min(self.most(adapter), *W.shape)).tolist()

    def menu(self, shares: Mapping[str, Sequence[float]], adapter: Any, price: base.Price = base.units) -> dict[str, list[Option]]:
        """ξ by module as options. The budget is then adapter.rank · len(shares).

        >>> [(o.bytes, round(o.loss, 4)) for o in fb.EVARanks().menu({"a": [0.6, 0.3]}, fb.LoRA(rank=1))["a"]]
        [(0, 0.9), (1, 0.3), (2, 0.0)]
        """
        most = self.most(adapter)
        return base.menu({name: base.leftover([float(x) for x in s][:most]) for name, s in shares.items()}, adapter, price)


def explained(R: Float[Tensor, "n n"], components: int) -> Float[Tensor, " c"]:
    """ξ of the first components, descending: R = XᵀX / t holds σ² / t.

    >>> explained(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    tensor([0.7500])
    """
    return top_svd(R, components).S / R.diagonal().sum()
