"""SM3: Memory-Efficient Adaptive Optimization.  Anil, Gupta, Koren & Singer, NeurIPS 2019.  arXiv:1901.11150v2.
Use it where the optimizer's state is what does not fit: of a weight it is one number a row and one a column.

With gradient g of θ, rate η, decay λ, and one accumulator μ_r for every slice r of every dimension (SM3-II):

    ν_i = min over the slices r of i of μ_r + g_i²,    μ_r ← max over i in r of ν_i,    θ_i ← θ_i − η λ θ_i − η g_i / √ν_i        (0/0 = 0)

Entries of a sparse delta have the rows and columns of the weight that they lie in, if a rule says where that is (`cover`); else a vector's
slices are its numbers, and this is Adagrad.
Deviations: no momentum, which would be four bytes a number; decay is decoupled, of which the paper says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finebits.optim._family import Usual, evaluated


@dataclass(frozen=True)
class SM3(Usual):
    """Accumulators of rows and columns.

    >>> W = torch.nn.Parameter(torch.zeros(2, 2))
    >>> W.grad = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> SM3().make([W], lr=0.5).step()
    >>> W.data  # at first a step of one length wherever there is a gradient
    tensor([[-0.5000, -0.0000],
            [-0.0000, -0.5000]])
    """

    adaptive: ClassVar[bool] = False
    label: ClassVar[str] = "SM3"

    def state(self, numbers: int) -> int:
        """At most: that of vectors."""
        return 4 * numbers

    def matrix(self, m: int, n: int) -> int:
        return 4 * (m + n)

    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        return Covered(groups, {"lr": lr, "weight_decay": 0.0})


class Covered(torch.optim.Optimizer):
    """SM3 over tensors of any number of dimensions; the state of dimension d is called by its number."""

    def __init__(self, groups: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self.covers: dict[nn.Parameter, tuple[Tensor, tuple[int, int]]] = {}

    def cover(self, p: nn.Parameter, places: Tensor, shape: tuple[int, int]) -> None:
        """The entries of vector `p` lie at these flat places of an (m, n) weight, now and whenever they are written anew."""
        self.covers[p] = places, shape

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = evaluated(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad.float(), group)
        return loss

    def _update(self, p: nn.Parameter, g: Tensor, group: dict[str, Any]) -> None:
        if p in self.covers:
            places, sizes = self.covers[p]
            at = [places.long() // sizes[1], places.long() % sizes[1]]
        else:
            sizes = p.shape or (1,)
            at = [torch.arange(n, device=p.device).view(-1, *(1,) * (len(sizes) - d - 1)).expand(sizes) for d, n in enumerate(sizes)]
        state = self.state[p]
        if not state:
            state.update({str(d): torch.zeros(n, device=p.device) for d, n in enumerate(sizes)})
        least = state["0"][at[0]]
        for d in range(1, len(sizes)):
            least = torch.minimum(least, state[str(d)][at[d]])
        nu = least.view(g.shape) + g.square()
        for d in range(len(sizes)):
            state[str(d)].scatter_reduce_(0, at[d].reshape(-1), nu.reshape(-1), "amax")
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_((group["lr"] * g * nu.rsqrt().masked_fill(nu == 0, 0.0)).to(p.dtype))
