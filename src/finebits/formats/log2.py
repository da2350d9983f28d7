"""RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers.  Li et al., ICCV 2023.  arXiv:2212.08254v2.

Powers of two or of √2 below the largest value, made for values after a softmax:

    log2    x̂ = Δ·2^(−k)        log√2    x̂ = Δ·2^(−k/2) = Δ·2^(−⌈k/2⌉)·((k mod 2)(√2 − 1) + 1),        Δ = max x

Deviations: the paper zeroes values beyond the last k and keeps 2^b values of k beside them; here the last code is zero, so k = 0 … 2^b − 2.
The nearest value is chosen, not the nearest exponent. Weights have two signs: `signed` spends the highest bit on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from finebits.errors import Invalid
from finebits.formats._stores import Store
from finebits.formats.base import Format


@dataclass(frozen=True)
class Log2(Format):
    """Powers of 2^(1/root), root 1 or 2, and zero; `block` columns share one absmax scale. Unsigned, what is negative becomes zero.

    >>> W = torch.tensor([[1.0, 0.7, 0.3, -0.1]])
    >>> fb.quantize(W, fb.Log2(4)).dequantize()  # 1, 1/2, 1/4 and -1/8
    tensor([[1.0000, 0.5000, 0.2500, -0.1250]])
    >>> fb.quantize(W, fb.Log2(4, root=2)).dequantize()  # with 1/√2 between 1 and 1/2
    tensor([[1.0000, 0.7071, 0.2500, -0.1250]])
    """

    bits: int = 4
    block: int | str = 64
    root: int = 1
    signed: bool = True
    scale: str | Store = "fp32"
    unit: int | None = None
    widths: ClassVar = (2, 3, 4, 5, 6, 7)  # eight bits would reach below the smallest float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root not in (1, 2):
            raise Invalid(f"Log2 has root 1 (powers of 2) or 2 (powers of √2), not {self.root}")

    def levels(self) -> tuple[float, ...]:
        last = 2 ** (self.bits - self.signed) - 1
        half = (*(self.power(k) for k in range(last)), 0.0)
        return (*half, *(-v for v in half)) if self.signed else half

    def power(self, k: int) -> float:
        """2^(−k/root).

        >>> fb.Log2(4).power(3), round(fb.Log2(4, root=2).power(1), 4)  # 1/8 and 1/√2
        (0.125, 0.7071)
        """
        return 2.0**-k if self.root == 1 else 2.0 ** -math.ceil(k / 2) * (k % 2 * (math.sqrt(2) - 1) + 1)
