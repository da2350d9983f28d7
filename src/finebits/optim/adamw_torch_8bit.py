"""8-bit Optimizers via Block-wise Quantization.  Dettmers, Lewis, Shleifer & Zettlemoyer, ICLR 2022.  arXiv:2110.02861v2.

AdamW whose m and v are bytes of a dynamic map, with one float32 scale for 256 of them: as adamw_8bit, computed by torchao, on a CPU too.
Deviations: as there, tensors of fewer than 4096 numbers, and those that 256 does not divide, keep the state of AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.optim._torchao import LowBit


@dataclass(frozen=True)
class AdamWTorch8bit(LowBit):
    """torchao's AdamW with state of 8 bits.

    >>> AdamWTorch8bit().matrix(64, 64)  # two bytes a number, two scales for 256, two tables of 256
    10368
    """

    hf: ClassVar[str] = "adamw_torch_8bit"
    label: ClassVar[str] = "8-bit Adam"
    bits: ClassVar[int] = 8
    block: ClassVar[int] = 256
    kind: ClassVar[str] = "AdamW8bit"
