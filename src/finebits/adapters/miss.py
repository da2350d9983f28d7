"""MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure.  Kang and Yin, ICLR 2026.  arXiv:2409.15371v12.
Use it for LoRA's quality at half its numbers and a cheaper step: one trained matrix, the sum of the inputs' shards in front of it.

    W′ = W + [D D … D],    ΔW x = D Σ_j x_j           x_j the j-th r inputs, D ∈ ℝ^{m×r}, held as Dᵀ ("block")
    bat:   W′_ij = W_ij + W_ij D_i + D_i              W_ij the (i, j)-th r × r block of W, D ∈ ℝ^{⌈m/r⌉×r×r}
    mini:  D's rows repeat with period `mini`

At birth D = 0. Without `bat` the update is the product of D and identities side by side, which is how it is exported as a LoRA.
Deviations: where r does not divide a side, the last block is cut off at the edge; the paper's bat wants whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters._rows import made, some, tiled
from finebits.adapters.base import Form, Layer, Params, Rescaled, check_scale, complete
from finebits.errors import Invalid
from finebits.qtensor import dense


@dataclass(frozen=True)
class MiSS(Usual):
    """One matrix of `rank` columns for every `rank` inputs. `mini` is the period of its rows (None: there is none); `bat` lets W in.

    >>> fb.MiSS(rank=1).merged({"block": torch.tensor([[1.0, 2.0]])}, torch.zeros(2, 3))
    tensor([[1., 1., 1.],
            [2., 2., 2.]])
    >>> fb.MiSS(rank=64).size(4096, 4096) / fb.LoRA(rank=64).size(4096, 4096)
    0.5
    """

    rank: int = 64
    mini: int | None = None
    bat: bool = False
    admits: ClassVar[frozenset[str] | None] = frozenset({"zeros"})

    def __post_init__(self) -> None:
        check_scale(self.rank, 1.0)
        if self.mini is not None and (self.bat or self.mini < 1):
            raise Invalid(f"mini is {self.mini} with bat={self.bat}; it is a period of at least 1, and bat has none")

    @property
    def form(self) -> Form:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "weight" if self.bat else "scaled"

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        return complete({k: torch.zeros(s) for k, s in self.shapes(*base.weight.shape).items()}, start, "MiSS")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        D, W, z = p["block"], base.weight, base.drop(x)
        m, n = W.shape
        if not self.bat:
            shards = F.pad(z, (0, -n % self.rank)).reshape(*z.shape[:-1], -(-n // self.rank), self.rank)
            return base(x) + torch.sum(shards, -2) @ self._repeated(D, m)
        if not tiled(base):
            return base(x) + F.linear(z, self._update(D, dense(W), slice(0, m)).to(z.dtype))

        def make(rows: slice, D: Tensor) -> Tensor:
            return self._update(D, some(W, rows, D.dtype), rows)

        return base(x) + made(z, m, make, D, whole=self.rank)

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        if self.bat:
            return dense(W) + self._update(p["block"], dense(W), slice(0, W.shape[0]))
        return self.scaled(p, W).of(dense(W))

    def scaled(self, p: Params, W: Float[Tensor, "m n"]) -> Rescaled:
        """D, and identities side by side."""
        m, n = W.shape
        D = self._repeated(p["block"], m)
        return Rescaled(None, None, D.mT, torch.eye(self.rank, dtype=D.dtype, device=D.device).repeat(1, -(-n // self.rank))[:, :n])

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        if self.rank > n:
            raise Invalid(
                f"MiSS shares {self.rank} columns among shards of the inputs, and this layer has {n} of them: take a smaller rank"
            )
        if self.bat:
            return {"block": (-(-m // self.rank), self.rank, self.rank)}
        if m % (self.mini or m):
            raise Invalid(f"MiSS repeats whole periods of {self.mini} rows, which {m} outputs are not: choose mini so that it divides them")
        return {"block": (self.rank, self.mini or m)}

    def _repeated(self, D: Float[Tensor, "r d"], m: int) -> Float[Tensor, "r m"]:
        return D if self.mini is None else D.repeat(1, m // self.mini)

    def _update(self, D: Float[Tensor, "i r r"], W: Float[Tensor, "t n"], rows: slice) -> Float[Tensor, "t n"]:
        """Rows of W D + D, block by block; `rows` begin with a block."""
        (t, n), r = W.shape, self.rank
        blocks = F.pad(W, (0, -n % r, 0, -t % r)).view(-(-t // r), r, -(-n // r), r)  # (i, a, j, k)
        own = D[rows.start // r : rows.start // r + len(blocks)]
        changed = torch.einsum("iajk,ikc->iajc", blocks, own) + own[:, :, None]
        return changed.reshape(len(blocks) * r, -1)[:t, :n]
