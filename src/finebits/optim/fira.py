"""Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?  Chen et al., 2024.  arXiv:2410.01623v2.
Use it in place of galore where its updates of low rank learn too little: the same state, and every direction moves.

With P, R, N and α as in GaLore, what P does not see of G moves too, at the rate that the inner optimizer gave what P sees:

    S = φ ∘ (G − P R),    φ_j = ‖N_:j‖ / ‖R_:j‖                     (norm-based scaling, column by column of R)
    S ← S · min(1, γ ‖S'‖ / ‖S‖)    S' the S of the last step       (norm-growth limiter)
    W ← W − η α (P N + S)

Deviations: for m ≥ n, where R = G P, φ goes row by row, so that a factor is always one of r numbers. α scales both parts. φ is 0 where R is.
P is found as galore's is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.optim._projected import Projected, Search, along, back, project, ratio, shortened, squares
from finebits.optim._shell import State
from finebits.optim.base import Optimizer


@dataclass(frozen=True)
class Fira(Projected):
    """`rank`, `gap` (T), `scale` (α), `search`, `inner` and `layerwise` as GaLore's; `growth` is γ.

    >>> Fira(rank=8).matrix(64, 96)  # bytes, as galore's
    8192
    >>> W = torch.nn.Parameter(torch.zeros(2, 2))
    >>> W.grad = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> Fira(rank=1, scale=1.0, inner="sgd").make([W], lr=1.0).step()  # P sees the first column alone, and the second row has no φ
    >>> W.data
    tensor([[-2.,  0.],
            [ 0.,  0.]])
    """

    rank: int = 128
    gap: int = 200
    scale: float = 0.25
    growth: float = 1.01
    search: Search = "randomised"
    inner: str | Optimizer = "adamw"
    layerwise: bool = False
    label: ClassVar[str] = "Fira"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.growth >= 1:
            raise Invalid(f"Fira lets S grow by a factor of growth a step, 1 or more; got {self.growth}")

    def before(self, G: Float[Tensor, "m n"], state: State) -> Tensor:
        R = project(G, self.basis(G, state))
        if "P" in state:
            state["R"] = R  # until `after`
        return R

    def after(self, N: Tensor, G: Float[Tensor, "m n"], state: State) -> Float[Tensor, "m n"]:
        P = state.get("P")
        if P is None:
            return self.scale * N
        R, d = state.pop("R"), along(G)
        phi = ratio(N, R, d)
        rest = (squares(G, d) - squares(R, d)).clamp(min=0)  # ‖G − P R‖², column by column
        phi = phi * shortened((phi.square() * rest).sum().sqrt(), self.growth, state)
        return back(self.scale * (N + phi * R), P, G).addcmul_(phi, G.float(), value=-self.scale)  # α (P N − S)
