"""Pure linear algebra with shapes: truncated SVD and its energy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid


class SVD(NamedTuple):
    """M ≈ U · diag(S) · Vh, singular values descending; `captured` = ΣS² / ‖M‖², the share of the energy that it holds.

    >>> top = top_svd(torch.diag(torch.tensor([4.0, 3.0])), 1)
    >>> top.S, top.captured  # 4² of 4² + 3²
    (tensor([4.]), 0.64)
    """

    U: Float[Tensor, "m r"]
    S: Float[Tensor, " r"]
    Vh: Float[Tensor, "r n"]
    captured: float

    @property
    def rest(self) -> float:
        """‖M − U diag(S) Vh‖², what is not captured.

        >>> round(top_svd(torch.diag(torch.tensor([4.0, 3.0])), 1).rest, 4)  # 3²
        9.0
        """
        energy = float(self.S.double().square().sum())
        return energy / self.captured - energy if self.captured < 1 else 0.0


def top_svd(
    M: Float[Tensor, "m n"], rank: int, *, exact: bool = False, depth: int | None = None, oversample: int | None = None, seed: int = 0
) -> SVD:
    """The first `rank` singular triples of M, in float32.

    Randomised block Krylov (Musco & Musco, NeurIPS 2015, arXiv:1504.05477, Alg. 2): the subspace of M·Ω, (M·Mᵀ)M·Ω, …, (M·Mᵀ)^(depth−1)M·Ω,
    each block of rank + `oversample` columns (by default as many as make 16, or none), orthonormalised as it grows, then Rayleigh–Ritz. Flat
    spectra, where powers converge slowly, are the usual case (a quantization residual): there depth serves better than width, and log₂ of M's
    smaller side, the default, holds 99.5 % of what the best triples hold. `exact`, or a subspace as large as M, gives the full SVD. The random
    start comes from `seed`; signs are fixed (largest entry of each U column positive), so results do not depend on the backend's choice.

    >>> U, S, Vh, captured = top_svd(torch.tensor([[2.0, 0.0], [2.0, 0.0], [1.0, 0.0]]), 1)
    >>> tuple(U.shape), tuple(Vh.shape), S, round(captured, 4)  # of rank one, so nothing is left
    ((3, 1), (1, 2), tensor([3.]), 1.0)
    """
    m, n = M.shape
    if not 1 <= rank <= min(m, n):
        raise Invalid(f"rank is {rank}; a {m}x{n} matrix has ranks 1 to {min(m, n)}")
    M = M.float()
    energy = float(torch.linalg.vector_norm(M, dim=1).double().square().sum())  # row by row: nothing of M's size is made
    depth = depth or max(min(m, n).bit_length() - 1, 1)
    width = max(rank, 16) if oversample is None else rank + oversample
    if exact or max(width * depth, 192) >= min(m, n):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    elif m > n:
        Vh, S, U = _krylov(M.mT.contiguous(), rank, width, depth, seed)
        U, Vh = U.mT, Vh.mT
    else:
        U, S, Vh = _krylov(M, rank, width, depth, seed)
    sign = signs(U)
    return SVD(U * sign, S, Vh * sign.mT, float(S.double().square().sum()) / energy if energy > 0 else 1.0)


def signs(U: Float[Tensor, "m r"]) -> Float[Tensor, "1 r"]:
    """By what columns are multiplied so that their largest entries are positive.

    >>> signs(torch.tensor([[1.0, 1.0], [2.0, -3.0]]))
    tensor([[ 1., -1.]])
    """
    sign = torch.gather(U, 0, U.abs().argmax(0, keepdim=True)).sign()
    return torch.where(sign == 0, 1.0, sign)


def _krylov(M: Tensor, rank: int, width: int, depth: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,), Vh (r, n) of a wide M (m <= n)."""
    gen = torch.Generator().manual_seed(seed)
    omega = torch.randn(M.shape[1], width, generator=gen).to(M.device)
    basis = torch.linalg.qr(M @ omega).Q  # (m, width)
    image = basis.mT @ M  # (width, n): what the Rayleigh–Ritz step needs is also the next power
    Q, T = [basis], [image]
    for _ in range(depth - 1):
        block = M @ image.mT
        K = torch.cat(Q, 1)
        for _ in range(2):  # once is not enough in float32
            block = block - K @ (K.mT @ block)
        basis = torch.linalg.qr(block).Q
        basis = torch.linalg.qr(basis - K @ (K.mT @ basis)).Q
        image = basis.mT @ M
        Q.append(basis)
        T.append(image)
    K, T = torch.cat(Q, 1), torch.cat(T)  # (m, width·depth), (width·depth, n)
    _, W = torch.linalg.eigh(T @ T.mT)  # ascending
    W = W.flip(1)[:, :rank]
    Vh = W.mT @ T
    S = torch.linalg.vector_norm(Vh, dim=1)
    return K @ W, S, Vh / S.clamp_min(torch.finfo(S.dtype).tiny)[:, None]


def damped_cholesky(H: Float[Tensor, "n n"], damp: float) -> Float[Tensor, "n n"]:
    """Lower L with L Lᵀ = H + λ·I in float32, λ = `damp` times the mean of H's diagonal.

    A Gram matrix of fewer tokens than columns is singular: where the factorisation breaks down, λ is the least damp·10^i (i = 1, 2, …, and
    at least 1e-7 of the mean) with which it stands. A zero matrix counts as the identity. Raises ValueError where H holds NaN or Inf.

    >>> damped_cholesky(torch.tensor([[4.0, 0.0], [0.0, 9.0]]), 0.0)
    tensor([[2., 0.], [0., 3.]])
    >>> damped_cholesky(torch.ones(2, 2), 0.0).isfinite().all()  # singular: it takes damping to stand
    tensor(True)
    """
    check_statistic(H)
    H = H.float()
    mean = float(H.diagonal().mean())
    if mean <= 0:
        return torch.eye(H.shape[0], device=H.device)
    info = torch.empty((), dtype=torch.int32, device=H.device)
    while True:
        L = H.mT.clone(memory_format=torch.contiguous_format).mT  # LAPACK's order of columns, in which it needs no copy of its own
        L.diagonal().add_(damp * mean)
        torch.linalg.cholesky_ex(L, out=(L, info))
        if not info.any() and finite(L.mT):
            return L
        damp = max(10 * damp, 1e-7)


def finite(t: Tensor) -> bool:
    """Is every number of a tensor finite? Nothing of its size is made for it.

    >>> finite(torch.tensor([1.0, 2.0])), finite(torch.tensor([1.0, torch.nan]))
    (True, False)
    """
    return not t.numel() or bool(torch.stack(torch.aminmax(t)).isfinite().all())


def check_statistic(value: Tensor, what: str = "the statistic of this module") -> None:
    """Raise if a statistic holds NaN or Inf.

    >>> check_statistic(torch.tensor([1.0, torch.inf]), "the Gram matrix")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: the Gram matrix holds NaN or Inf: look for them in the calibration data, or run the model in a wider dtype
    """
    if not finite(value):
        raise Invalid(f"{what} holds NaN or Inf: look for them in the calibration data, or run the model in a wider dtype")
