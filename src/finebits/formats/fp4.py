"""Microscaling Data Formats for Deep Learning (the four-bit float E2M1).  Rouhani et al., 2023.  arXiv:2310.10537v3.

A sign bit over three bits of magnitude, absolute maximum on the largest level:

    ocp    E2M1:  0 .5 1 1.5 2 3 4 6
    bnb    0 .0625 8 12 4 6 2 3, all divided by 12: what bitsandbytes calls FP4, in the order of its codes

Deviations: the scale is a real number here (mxfp4 and nvfp4 have the standards' scales). Zero is encoded as +0; both zeros decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from finebits.errors import Invalid
from finebits.formats._floats import E2M1
from finebits.formats._stores import Store
from finebits.formats.base import Format

BNB = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclass(frozen=True)
class FP4(Format):
    """`block` columns share one absmax scale, held in `scale`; `variant` is the standard's table or that of bitsandbytes.

    >>> W = torch.tensor([[0.4, 2.4, 5.2, -6.0]])
    >>> fb.quantize(W, fb.FP4()).dequantize()  # scale 1: to .5, 2, 6 and -6
    tensor([[0.5000, 2.0000, 6.0000, -6.0000]])
    >>> [round(12 * v, 4) for v in fb.FP4(variant="bnb").levels()[:8]]
    [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    """

    block: int | str = 64
    variant: Literal["ocp", "bnb"] = "ocp"
    scale: str | Store = "fp32"
    unit: int | None = None
    bits: ClassVar[int] = 4  # pyright: ignore[reportIncompatibleVariableOverride]
    widths: ClassVar = (4,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("ocp", "bnb"):
            raise Invalid(f"FP4 has the variants ocp and bnb, not {self.variant!r}")

    def levels(self) -> tuple[float, ...]:
        half = E2M1 if self.variant == "ocp" else tuple(v / 12 for v in BNB)
        return (*half, *(-v for v in half))
