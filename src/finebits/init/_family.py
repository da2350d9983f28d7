"""What initialisers of this folder share: factors of a low-rank product for an adapter of any scale, and the metric of the outputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.linalg import SVD, check_statistic, damped_cholesky, top_svd

EPS = 1e-6  # singular values below this share of the largest are rounding noise of float32


def check(W: Tensor, adapter: object, who: str) -> None:
    """Raise if the adapter's rank does not fit W, or W holds NaN or Inf."""
    m, n = W.shape
    rank = getattr(adapter, "rank", None)
    if not rank:
        raise Invalid(f"{who} starts low-rank factors, and {type(adapter).__name__} has no rank: choose another init for it")
    if rank > min(m, n):
        raise Invalid(f"{who} needs a rank of at most {min(m, n)} for a {m}x{n} weight, and the adapter has {rank}: lower its rank")
    if not torch.isfinite(W.sum(dtype=torch.float64)):
        raise Invalid(f"the weight holds NaN or Inf: {who} cannot factor it; check the checkpoint")


def check_gram(R: Tensor, W: Float[Tensor, "m n"]) -> None:
    """Raise if R is not the Gram matrix of W's inputs, or holds NaN or Inf."""
    if R.shape != (W.shape[1], W.shape[1]):
        raise Invalid(f"the Gram matrix is {tuple(R.shape)} and the weight has {W.shape[1]} inputs: the statistics are another module's")
    check_statistic(R)


def product(svd: SVD) -> Float[Tensor, "m n"]:
    """U diag(S) Vh."""
    return svd.U * svd.S @ svd.Vh


def halves(U: Float[Tensor, "m r"], S: Float[Tensor, " r"], Vh: Float[Tensor, "r n"], s: float) -> Params:
    """B, A with s·B A = U diag(S) Vh and √(S/s) in each factor.

    Where S is nothing, B's column is zero and A's row is of the size of its neighbours', so that training can leave the point; where all
    of S is nothing the adapter is born as it likes.
    """
    if not S.numel() or not float(S.max()) > 0:
        return {}
    live = S > EPS * S.max()
    root = (torch.where(live, S, 0.0) / s).sqrt()
    size = root[live].mean()
    return {"B": U * root, "A": torch.where(live, root, size)[:, None] * _unit(Vh, live)}


def _unit(Vh: Tensor, live: Tensor) -> Tensor:
    if live.all():
        return Vh
    full = torch.linalg.qr(torch.cat([Vh[live], torch.eye(*Vh.shape[1:] * 2, device=Vh.device)[: len(Vh)]]).mT).Q.mT
    out = Vh.clone()
    out[~live] = full[int(live.sum()) :][: int((~live).sum())]
    return out


def sizes(d: Tensor, damp: float, W: Float[Tensor, "m n"]) -> Float[Tensor, " n"]:
    """√(d + λ) with d the mean squares of W's inputs and λ = damp·mean(d): what `Outputs` has for inputs that do not correlate."""
    if d.shape != W.shape[1:]:
        raise Invalid(f"the mean squares are {tuple(d.shape)} and the weight has {W.shape[1]} inputs: the statistics are another module's")
    check_statistic(d)
    mean = float(d.mean())
    return (d.to(W.device) + max(damp, 1e-7) * mean).sqrt() if mean > 0 else torch.ones_like(d, device=W.device)


class Outputs:
    """The metric E ‖E x‖² = ‖E S‖² with S Sᵀ = R + λI the damped Gram matrix of the inputs."""

    def __init__(self, R: Tensor, damp: float, W: Float[Tensor, "m n"]) -> None:
        check_gram(R, W)
        self.S = damped_cholesky(R.to(W.device), damp)

    def norm(self, E: Float[Tensor, "m n"]) -> float:
        """The square root of the output error."""
        return float((E @ self.S).norm())

    def top(self, E: Float[Tensor, "m n"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U, S, V with U diag(S) V the matrix of that rank nearest to E in this metric. V's rows are not orthonormal."""
        U, S, Vh, _ = top_svd(E @ self.S, rank)
        return U, S, torch.linalg.solve_triangular(self.S, Vh, upper=False, left=False)


def gradient(G: Tensor, W: Float[Tensor, "m n"], who: str) -> Float[Tensor, "m n"]:
    """G, if it is a gradient of W that has directions."""
    if G.shape != W.shape:
        raise Invalid(f"the gradient is {tuple(G.shape)} and the weight {tuple(W.shape)}: the statistics are another module's")
    check_statistic(G)
    if not G.any():
        raise Invalid(f"{who} follows the gradient, and this module's is zero: leave the module out of the plan, or use more data")
    return G.float().to(W.device)
