"""DoRA: Weight-Decomposed Low-Rank Adaptation.  Liu et al., ICML 2024.  arXiv:2402.09353v6.
Use it where LoRA of a small rank learns too little: a length for every row is trained beside its direction; a step is slower.

    V = W + s·B A,    W′ = diag(mag/‖V‖) V,    ‖V‖ by row,    s = α/r                                                       (eq. 5)

At birth mag = ‖V‖, so that W′ = V, with B = 0 and A uniform in ±1/√n. In the backward pass ‖V‖ counts as a constant (section 4.3). It is had
without V:

    ‖v_i‖² = ‖w_i‖² + 2 s ⟨w_i Aᵀ, b_i⟩ + s² b_i (A Aᵀ) b_iᵀ

Deviations: the paper takes norms over columns of a weight that is (in, out); here they are rows, as in the authors' code. ‖w_i‖ is held
("norm"), made anew from the base when an adapter is loaded. A row of zeros has no direction and keeps the factor 1. With dropout the update and
what mag changes see the dropped inputs, and the base the whole ones, as in PEFT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Scaled
from finebits.adapters._frozen import Frozen
from finebits.adapters._rows import some, tiles
from finebits.adapters.base import Base, Form, Layer, Params, Rescaled, complete
from finebits.qtensor import dense


@dataclass(frozen=True)
class DoRA(Scaled):
    """A low-rank update of directions, and a trained length ("mag") for every row.

    >>> p = {"B": torch.tensor([[4.0]]), "A": torch.tensor([[0.0, 1.0]]), "mag": torch.tensor([10.0])}
    >>> fb.DoRA(rank=1, alpha=1).merged(p, torch.tensor([[3.0, 0.0]]))  # (3, 4), which is 5 long
    tensor([[6., 8.]])
    >>> fb.DoRA(rank=32).size(4096, 4096) - fb.LoRA(rank=32).size(4096, 4096)
    4096
    """

    rank: int = 16
    alpha: float = 16.0
    frozen: ClassVar[frozenset[str]] = frozenset({"norm"})
    own: ClassVar[str] = "zeros"
    form: ClassVar[Form] = "scaled"
    kept: ClassVar[frozenset[str]] = frozenset({"mag", "norm"})

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        A = (torch.rand(self.rank, n, generator=gen) * 2 - 1) / math.sqrt(n)
        own = {"A": A, "B": torch.zeros(m, self.rank), "mag": torch.zeros(m)}
        p = complete(own, start, "DoRA")
        if "mag" not in start:
            on = {k: t.to(base.weight.device) for k, t in (p | self.buffers(base, gen)).items()}
            p["mag"] = self._norm(on, base).to(A.device)
        return p

    def buffers(self, base: Layer, gen: Generator) -> Params:
        return {"norm": norms(base.weight)}

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        wide = x.float()  # 16 bits round what a ratio near 1 changes away
        z, y = base.drop(wide), base(wide)
        on_z = y if z is wide else base(z)
        ratio = self._ratio(p, self._norm(p, base))
        own = on_z if base.bias is None else on_z - base.bias
        A, B = p["A"].float(), p["B"].float()
        return (y + (ratio - 1) * own + F.linear(F.linear(z, A), self.s * ratio[:, None] * B)).to(x.dtype)

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        V = dense(W) + self.s * p["B"] @ p["A"]
        return self._ratio(p, V.detach().square().sum(1).sqrt())[:, None] * V

    def scaled(self, p: Params, W: Float[Tensor, "m n"]) -> Rescaled:
        """Rows by mag/‖V‖, and the update behind it."""
        ratio = self._ratio(p, self._norm(p | {"norm": norms(W)}, Base(W)))
        return Rescaled(ratio, None, self.s * ratio[:, None] * p["B"], p["A"])

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, n), "B": (m, self.rank), "mag": (m,), "norm": (m,)}

    def _ratio(self, p: Params, norm: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        return torch.where(norm > 0, p["mag"] / torch.where(norm > 0, norm, 1.0), 1.0)

    @torch.no_grad()
    def _norm(self, p: Params, base: Layer) -> Float[Tensor, " m"]:
        """‖V‖ by row. Where B = 0 it is ‖W‖ to the bit, whatever the dtype: √(a²) = a."""
        B, gram = p["B"].float(), p["A"].float() @ p["A"].float().mT
        still = _still(base)
        norm = (norms(base.weight) if still is None else p["norm"]).float()
        across = (still or Base(base.weight))(p["A"]).float().mT  # (m, r): w_i Aᵀ
        square = norm**2 + 2 * self.s * (across * B).sum(1) + self.s**2 * (B @ gram * B).sum(1)
        return square.clamp(min=0).sqrt()


def _still(layer: Layer) -> Layer | None:
    """The layer without its bias, where its weight never moves; None where an adapter below is trained."""
    if isinstance(layer, Base):
        return layer._replace(bias=None) if layer.frozen else None
    below = _still(layer.base) if isinstance(layer.adapter, Frozen) else None
    return None if below is None else layer._replace(base=below)


@torch.no_grad()
def norms(W: Float[Tensor, "m n"]) -> Float[Tensor, " m"]:
    """Lengths of the rows in float32, of a packed weight a tile at a time.

    >>> norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([5., 0.])
    """
    return torch.cat([some(W, rows, torch.float32).square().sum(1).sqrt() for rows in tiles(*W.shape)])
