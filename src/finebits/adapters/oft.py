"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning.  Qiu et al., NeurIPS 2023.  arXiv:2306.07280v3.
With the products of inputs of OFTv2: Orthogonal Finetuning Made Scalable.  Qiu et al., EMNLP 2025.  arXiv:2506.19847v1.
Use it where the angles between neurons are to be kept, so that what the model knows is disturbed least.

    y = W (Rᵀ x) + b,    W′ = W Rᵀ,    R = diag(R_1 … R_{n/d}),    R_i = (I + Q_i)(I − Q_i)⁻¹,    Q_i = −Q_iᵀ ∈ ℝ^{d×d}
    terms t:   R_i ≈ I + 2 Q_i + 2 Q_i² + … + 2 Q_i^{t−2} + Q_i^{t−1}    (OFTv2)

"R" holds the numbers of Q_i above the diagonal, row by row. At birth Q = 0 and R = I, whatever the base is held in: only inputs are turned.
Deviations: the last power of the series counts once, as in the authors' code; the constraint of COFT on ‖Q‖ is left out. PEFT's exact transform
(use_cayley_neumann=False) is of −Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters.base import Layer, Params, complete
from finebits.errors import Invalid
from finebits.qtensor import dense


@dataclass(frozen=True)
class OFT(Usual):
    """Rotations of blocks of `block` inputs; one for all of them if `alike`. `terms` of the series are summed, and 0 is the exact transform.

    >>> adapter = fb.OFT(block=2, terms=0)
    >>> adapter.merged({"R": torch.tensor([[1.0]])}, torch.eye(2))  # a quarter turn
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """

    block: int = 32
    terms: int = 5
    alike: bool = False
    rank: ClassVar[int] = 0
    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.block < 2:
            raise Invalid(f"block is {self.block}; a rotation needs at least 2 inputs")
        if self.terms < 4 and self.terms != 0:
            raise Invalid(f"terms is {self.terms}; a series has at least 4 of them, and 0 is the exact transform")

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        return complete({k: torch.zeros(s) for k, s in self.shapes(*base.weight.shape).items()}, start, "OFT")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        return base(_turned(x, self._rotations(p["R"])))

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return _turned(dense(W), self._rotations(p["R"]).mT)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        if n % self.block:
            fits = [d for d in range(2, n + 1) if n % d == 0]
            raise Invalid(
                f"OFT turns whole blocks of {self.block} inputs, and {n} inputs have blocks of {', '.join(map(str, fits)) or 'none'}"
            )
        return {"R": (1 if self.alike else n // self.block, self.block * (self.block - 1) // 2)}

    def _rotations(self, q: Float[Tensor, "i e"]) -> Float[Tensor, "i d d"]:
        d = self.block
        above = torch.triu_indices(d, d, 1, device=q.device)
        half = q.new_zeros(len(q), d, d, dtype=torch.float32)
        half[:, above[0], above[1]] = q.float()
        Q, I = half - half.mT, torch.eye(d, device=q.device)  # noqa: E741
        if not self.terms:
            return cast(Tensor, torch.linalg.solve(I - Q, I + Q, left=False))  # pyright: ignore[reportUnknownMemberType]
        total, power = I + 2 * Q, Q
        for t in range(2, self.terms):
            power = power @ Q
            total = total + (2 if t < self.terms - 1 else 1) * power
        return total


def _turned(x: Float[Tensor, "*t n"], R: Float[Tensor, "i d d"]) -> Float[Tensor, "*t n"]:
    """x diag(R_1 …), of one R repeated where there is one."""
    d = R.shape[-1]
    return torch.einsum("...id,idc->...ic", x.unflatten(-1, (-1, d)), R.to(x.dtype).expand(x.shape[-1] // d, d, d)).flatten(-2)
