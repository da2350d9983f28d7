"""Memory Efficient Optimizers with 4-bit States.  Li, Chen & Zhu, NeurIPS 2023.  arXiv:2309.01507v3.

AdamW whose m takes values of a signed dynamic map and v those of an even one without zero, of 4 bits, with one float32 scale for 128 of them;
torchao computes it, on a CPU too.
Deviations: torchao's: v has one scale for a block where the paper takes the lesser of a row's and a column's; tensors of fewer than 4096
numbers, and those that 128 does not divide, keep the state of AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.optim._torchao import LowBit


@dataclass(frozen=True)
class AdamWTorch4bit(LowBit):
    """torchao's AdamW with state of 4 bits.

    >>> AdamWTorch4bit().matrix(64, 64)  # a byte a number, two scales for 128, two tables of 16
    4480
    """

    hf: ClassVar[str] = "adamw_torch_4bit"
    label: ClassVar[str] = "4-bit Adam"
    bits: ClassVar[int] = 4
    block: ClassVar[int] = 128
    kind: ClassVar[str] = "AdamW4bit"
