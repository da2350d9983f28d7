"""Natural GaLore: Accelerating GaLore for Memory-Efficient LLM Training and Fine-Tuning.  Das, 2024.  arXiv:2410.16029v1.
Use it in place of galore where steps are few and memory is left: it turns gradients by the curvature that it saw, and keeps s of them.

With R = Pᵀ G as in GaLore, g = vec(R) and H the last s of such columns, this one with them, Woodbury's identity gives the natural gradient:

    g̃ = (λ I + H Hᵀ)⁻¹ g = g/λ − H (I + HᵀH/λ)⁻¹ Hᵀg / λ²,        W ← W − η α P ρ(g̃)

Since g is a column of H, g = H e, the same is H (λ I + HᵀH)⁻¹ e: that form cancels nothing where H is much longer than √λ. HᵀH is kept, of
which a step changes one row.

Deviations: ρ is given λ g̃, so that Adam's ε means what it does in GaLore, which the method is for large λ. H is emptied when P changes: its
columns are coordinates in P. P is found as galore's is, of one side, where the authors' code has two by default. H is state (s·r·max(m, n)
numbers, ten times GaLore's moments at s = 20), which the abstract does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.optim._projected import Projected, Search, project, proxy, thin
from finebits.optim._shell import State, Thin
from finebits.optim.base import Optimizer


@dataclass(frozen=True)
class NaturalGaLore(Projected):
    """`damping` is λ, `history` s; all else is as in GaLore.

    >>> NaturalGaLore(rank=8, history=2).matrix(64, 96)  # galore's 8192, two gradients of 8 x 96 and their products
    14352
    >>> W = torch.nn.Parameter(torch.zeros(1, 2))
    >>> W.grad = torch.tensor([[3.0, 4.0]])
    >>> NaturalGaLore(rank=1, damping=5.0, scale=1.0, inner="sgd").make([W], lr=6.0).step()  # 5 g / (5 + ‖g‖²)
    >>> W.data
    tensor([[-3., -4.]])
    """

    rank: int = 128
    gap: int = 200
    scale: float = 0.25
    damping: float = 1e-3
    history: int = 20
    search: Search = "randomised"
    inner: str | Optimizer = "adamw"
    layerwise: bool = False
    label: ClassVar[str] = "Natural GaLore"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0 or self.history < 1:
            raise Invalid(f"NaturalGaLore needs damping above 0 and a history of 1 or more; got {self.damping} and {self.history}")

    def before(self, G: Float[Tensor, "m n"], state: State) -> Tensor:
        searches = state.get("svds")
        R = project(G, self.basis(G, state))
        if "H" not in state or state.get("svds") != searches:
            state["H"], state["HH"], state["seen"] = R.new_zeros(self.history, R.numel()), R.new_zeros(self.history, self.history), 0
        return natural(R, self.damping, state)

    def after(self, N: Tensor, G: Float[Tensor, "m n"], state: State) -> Float[Tensor, "m n"] | Thin:
        return thin(N, state.get("P"), G, self.scale)

    def matrix(self, m: int, n: int) -> int:
        a, b = proxy(m, n, self.rank)
        return super().matrix(m, n) + 4 * self.history * (a * b + self.history)


def natural(R: Tensor, damping: float, state: State) -> Tensor:
    """λ (λ I + H Hᵀ)⁻¹ g in the shape of R, after g took the place of the oldest row of H, which is held transposed.

    >>> state = {"H": torch.zeros(2, 2), "HH": torch.zeros(2, 2), "seen": 0}
    >>> natural(torch.tensor([[3.0, 4.0]]), 5.0, state), state["HH"]
    (tensor([[0.5000, 0.6667]]), tensor([[25.,  0.],
            [ 0.,  0.]]))
    """
    H, HH, g = state["H"], state["HH"], R.flatten()
    i = state["seen"] % len(H)
    H[i] = g
    HH[i] = HH[:, i] = H @ g
    state["seen"] += 1
    w, Q = torch.linalg.eigh(HH.double())  # where gradients repeat, float32 products have eigenvalues a little below 0
    weights = Q @ (Q[i] / (1 + w.clamp(min=0) / damping))
    return (weights.float() @ H).reshape(R.shape)
