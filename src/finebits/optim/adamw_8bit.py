"""8-bit Optimizers via Block-wise Quantization.  Dettmers, Lewis, Shleifer & Zettlemoyer, ICLR 2022.  arXiv:2110.02861v2.

AdamW whose m and v are bytes of a dynamic map, with one float32 absmax for 256 of them: 2 + 2·4/256 bytes a number. bitsandbytes computes it.
Deviations: as there, tensors of fewer than 4096 numbers keep float32 state, of which the price says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from finebits.errors import Invalid
from finebits.optim._family import Usual

if TYPE_CHECKING:
    import torch

BLOCK = 256  # numbers under one absmax


@dataclass(frozen=True)
class AdamW8bit(Usual):
    """bitsandbytes' AdamW with state of 8 bits.

    >>> AdamW8bit().state(1024)  # two bytes a number, and two absmax for 256
    2080
    """

    hf: ClassVar[str] = "adamw_bnb_8bit"
    label: ClassVar[str] = "8-bit Adam"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def state(self, numbers: int) -> int:
        return 2 * numbers + 2 * 4 * -(-numbers // BLOCK)

    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        try:
            from bitsandbytes.optim.adamw import AdamW8bit as Theirs
        except ImportError:
            raise Invalid("training.optim adamw_8bit needs bitsandbytes: pip install bitsandbytes, or take adamw") from None
        return Theirs(groups, lr=lr, betas=betas, eps=eps)
