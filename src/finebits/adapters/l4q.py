"""L4Q: Parameter Efficient Quantization-Aware Fine-Tuning on Large Language Models.  Jeon, Kim & Kim, ACL 2025.  arXiv:2402.04902v6.
Use it to serve integers of 4, 3 or 2 bits that are what was trained, where there is room for the dense weight while training.

    V = W + s·B A,    Ŵ = Δ · clamp(round(V/Δ + z), 0, 2^b − 1) − Δ z,    s = α/r

A, B, Δ (and z) are trained together, by the gradients of LSQ through the one matrix gᵀ x, which is made and dropped a few rows at
a time. Δ begins so that nothing is clipped, Δ = max(|min W/Qn|, |max W/Qp|) by block, and z in the middle (L4Q-init).
Deviations: log Δ is trained, so that one rate suits all blocks and no step changes its sign. The offset β = −Δ z is a whole number of steps,
which is what layouts hold, and is trained where `symmetric` is False alone. Δ is rounded to what it is held in as it is used. Where the plan's
quantizer does more than round to nearest (gptq), W, Δ and z begin as what it has found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters._codes import Rounded


@dataclass(frozen=True)
class L4Q(Rounded):
    """The merged weight, rounded to integers of `bits` bits; `block` columns share a step, held in `scale`.

    >>> adapter, W = fb.L4Q(rank=1, bits=4, scale="fp32"), torch.tensor([[7.0, 1.2]])
    >>> p = adapter.params(fb.adapters.base.Base(W), torch.Generator(), {})
    >>> adapter.coded(p, W).format, adapter.merged(p, W).round(decimals=4)
    (Int(bits=4, block=128, symmetric=True, scale='fp32', variant='full', unit=None), tensor([[7., 1.]]))
    """

    rank: int = 4
    alpha: float = 4.0
    bits: int = 4
    block: int | str = 128
    symmetric: bool = True
    scale: str = "bf16"

    @property
    def s(self) -> float:
        """The factor in front of the product: α/r."""
        return self.alpha / self.rank

    def begun(self, W: Float[Tensor, "r n"]) -> tuple[Tensor, Tensor]:
        scale = replace(self.grid, symmetric=True, variant="full").spanning(W).scale
        return scale, torch.full_like(scale, 2.0 ** (self.bits - 1))
