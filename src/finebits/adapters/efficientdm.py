"""EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models.  He et al., ICLR 2024.
Use it as l4q, with one scale and zero point a row: what servers without groups hold.

    Ŵ = Q_U(W + B A)

Q_U is affine and by row, its scale and zero point trained with A and B. Rounding absorbs updates below a step, so that rows of wide steps want
larger rates: the rule scale_aware_rates.
Deviations: this is the adapter alone, without the quantizers of activations by time step and the distillation; W is dense and not decoded from
8 bits; scales begin at min and max, or as a plan's quantizer has found them; log Δ is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from finebits.adapters._codes import Rounded


@dataclass(frozen=True)
class EfficientDM(Rounded):
    """The merged weight, rounded to integers of `bits` bits with a scale and a zero point a row.

    >>> fb.EfficientDM(rank=8).grid
    Int(bits=4, block='row', symmetric=False, scale='bf16', variant='integer', unit=None)
    """

    rank: int = 32
    bits: int = 4
    scale: str = "bf16"
    block: ClassVar[int | str] = "row"  # pyright: ignore[reportIncompatibleVariableOverride]
    symmetric: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleVariableOverride]
    s: ClassVar[float] = 1.0  # pyright: ignore[reportIncompatibleMethodOverride]

    def begun(self, W: Float[Tensor, "r n"]) -> tuple[Tensor, Tensor]:
        scale, low, _ = self.grid.ideal(W)
        assert low is not None
        return scale, self.grid.zero(scale, low).float()
