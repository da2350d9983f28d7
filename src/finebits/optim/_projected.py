"""What optimizers share that see a gradient G (m, n) through a thin basis P of its shorter side, s = min(m, n):

    m < n:  R = Pᵀ G (r, n),  back(N) = P N          m ≥ n:  R = G P (m, r),  back(N) = N Pᵀ          P (s, r),  Pᵀ P = I

P holds the first singular vectors of some gradient, found anew now and then. At r ≥ s any basis spans all there is: P is the identity then,
and is not held.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits import registry
from finebits.errors import Invalid
from finebits.linalg import finite, signs, top_svd
from finebits.optim._family import Usual
from finebits.optim._shell import Shell, State, Thin
from finebits.optim.base import Optimizer

Search = Literal["randomised", "exact", "warm"]
FEW = 256  # rows, at most, of what the eigenvectors of G Gᵀ are found of in less time
DEPTH, OVERSAMPLE = 3, 8  # of the randomised search: two powers of G Gᵀ beyond the first look


def proxy(m: int, n: int, rank: int) -> tuple[int, int]:
    """The shape of R.

    >>> proxy(8, 3, 2), proxy(3, 8, 2), proxy(3, 8, 5)
    ((8, 2), (2, 8), (3, 8))
    """
    r = min(rank, m, n)
    return (r, n) if m < n else (m, r)


def project(G: Float[Tensor, "m n"], P: Float[Tensor, "s r"] | None) -> Tensor:
    """R, in float32.

    >>> project(torch.eye(2, 3), torch.tensor([[1.0], [0.0]]))
    tensor([[1., 0., 0.]])
    """
    if P is None:
        return G.float()
    return P.mT @ G.float() if G.shape[0] < G.shape[1] else G.float() @ P


def back(N: Tensor, P: Float[Tensor, "s r"] | None, G: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """What N, of the shape of R, is in the shape of G.

    >>> back(torch.ones(1, 3), torch.tensor([[1.0], [0.0]]), torch.eye(2, 3))
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    """
    if P is None:
        return N
    return P @ N if G.shape[0] < G.shape[1] else N @ P.mT


def thin(N: Tensor, P: Float[Tensor, "s r"] | None, G: Float[Tensor, "m n"], scale: float) -> Tensor | Thin:
    """scale · back(N), not multiplied out; at full rank N itself, scaled where it is.

    >>> thin(torch.ones(1, 3), torch.tensor([[1.0], [0.0]]), torch.eye(2, 3), 2.0)
    Thin(L=tensor([[1.],
            [0.]]), R=tensor([[1., 1., 1.]]), scale=2.0)
    """
    if P is None:
        return N.mul_(scale)
    return Thin(P, N, scale) if G.shape[0] < G.shape[1] else Thin(N, P.mT, scale)


def along(G: Tensor) -> int:
    """The dimension of R that counts the r directions.

    >>> along(torch.ones(2, 3)), along(torch.ones(3, 2))
    (0, 1)
    """
    return 0 if G.shape[0] < G.shape[1] else 1


def squares(X: Tensor, dim: int | None) -> Tensor:
    """‖X‖² along a dimension, or of the whole, in float32.

    >>> squares(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), 0), squares(torch.ones(2, 2), None)
    (tensor([[25.,  1.]]), tensor([[4.]]))
    """
    return X.float().square().sum(dim, keepdim=True)  # a norm along the first dimension takes torch ten times as long


def ratio(N: Tensor, R: Tensor, dim: int | None) -> Tensor:
    """‖N‖ / ‖R‖ along a dimension, or of the whole; 0 where R is 0.

    >>> ratio(torch.tensor([[6.0, 1.0]]), torch.tensor([[3.0, 0.0]]), 0)
    tensor([[2., 0.]])
    """
    norm = squares(R, dim).sqrt()
    return torch.where(norm > 0, squares(N, dim).sqrt() / norm, 0.0)


def shortened(length: Tensor, growth: float, state: State) -> float:
    """What something of this length is multiplied with, to be no longer than `growth` times the last one.

    >>> state = {}
    >>> [round(x * shortened(torch.tensor(x), 1.5, state), 4) for x in (2.0, 2.5, 9.0, 1.0)]
    [2.0, 2.5, 3.75, 1.0]
    """
    now, last = float(length), state.get("length", 0.0)
    state["length"] = min(now, growth * last) if last > 0 else now
    return state["length"] / now if now > 0 else 1.0


def due(G: Tensor, state: State, gap: int, held: str) -> bool:
    """Is it time to look for a basis? One more step is counted. A gradient with NaN or Inf has none: the next one is asked.

    >>> state = {"P": torch.eye(2)}
    >>> [due(torch.ones(2, 2), state, 3, "P") for _ in range(7)]
    [False, False, False, True, True, True, True]
    """
    state["steps"] = state.get("steps", -1) + 1
    if held in state and state["steps"] - state.get("found", 0) < gap:
        return False
    if finite(G):
        return True
    if held not in state:
        raise Invalid(
            f"the first gradient of a weight {tuple(G.shape)} holds NaN or Inf, so that there is no basis to project it on: look at the "
            "data, lower the learning rate, or train in a wider dtype"
        )
    return False


def leading(G: Float[Tensor, "m n"], rank: int, search: Search, old: Tensor | None, state: State) -> Float[Tensor, "s r"]:
    """The first singular vectors of the shorter side of G, orthonormal. Counted in `state`: searches, and the step of the last.

    "warm" multiplies the `old` basis with G Gᵀ and makes it orthonormal again: one step of subspace iteration, whose vectors are near to those
    that they replace. The others are found from nothing, with the signs of top_svd.

    >>> state = {"steps": 0}
    >>> leading(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2, "randomised", None, state), state["svds"]
    (tensor([[0., 0.],
            [1., 0.],
            [0., 1.]]), 1)
    """
    state["svds"], state["found"] = state.get("svds", 0) + 1, state["steps"]
    wide = G.float() if G.shape[0] < G.shape[1] else G.float().mT
    if search == "warm" and old is not None:
        Q, R = torch.linalg.qr(wide @ (wide.mT @ old))
        return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    if search == "exact":
        return top_svd(wide, rank, exact=True).U.contiguous()
    if len(wide) <= FEW:
        U = torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(1)[:, :rank]
        return U * signs(U)
    return top_svd(wide, rank, depth=DEPTH, oversample=OVERSAMPLE).U.contiguous()


class Transformed(Usual):
    """An optimizer that gives `inner` what it makes of the gradients of matrices, and all other gradients as they are. Abstract."""

    alone: ClassVar[bool] = True
    rank: int
    gap: int
    inner: str | Optimizer

    def __post_init__(self) -> None:
        who = type(self).__name__
        for name in ("rank", "gap"):
            if (value := getattr(self, name)) < 1:
                raise Invalid(f"{who} needs a {name} of 1 or more; got {value}")
        if isinstance(self.within, Transformed):
            raise Invalid(
                f"{who} works through a plain optimizer, such as adamw, and inner is {self.inner}, which transforms gradients itself"
            )

    @property
    def within(self) -> Optimizer:
        """The inner optimizer."""
        return registry.load("optim", self.inner)() if isinstance(self.inner, str) else self.inner

    @property
    def devices(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.within.devices

    def fits(self, m: int, n: int) -> bool:
        return True

    @abstractmethod
    def before(self, G: Float[Tensor, "m n"], state: State) -> Tensor:
        """What the inner optimizer sees."""

    @abstractmethod
    def after(self, N: Tensor, G: Float[Tensor, "m n"], state: State) -> Float[Tensor, "m n"] | Thin:
        """The change of the weight at rate 1."""

    def state(self, numbers: int) -> int:
        return self.within.state(numbers)

    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        return Shell(groups, lambda held: self.within.make(held, lr, betas, eps), self, self.layerwise)


class Projected(Transformed):
    """One whose basis is held in float32 and found every `gap` steps. Abstract."""

    search: Search

    def basis(self, G: Float[Tensor, "m n"], state: State) -> Tensor | None:
        """P of this step, found first where it is time; None where it is the identity."""
        if self.rank < min(G.shape) and due(G, state, self.gap, "P"):
            state["P"] = leading(G, self.rank, self.search, state.get("P"), state)
        return state.get("P")

    def matrix(self, m: int, n: int) -> int:
        s = min(m, n)
        return self.within.matrix(*proxy(m, n, self.rank)) + (4 * s * self.rank if self.rank < s else 0)
