"""What torchao's optimizers of low-bit state share: prices by its rule of what stays dense, and steps that need no compiler."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch

from finebits.errors import Invalid
from finebits.optim._family import Usual

LEAST = 4096  # numbers of a tensor below which its state stays dense


class LowBit(Usual):
    """AdamW whose m and v are `bits` wide, with one float32 scale for `block` of them and a table of all values for each. Abstract."""

    bits: ClassVar[int]
    block: ClassVar[int]
    kind: ClassVar[str]  # its class in torchao.optim

    def state(self, numbers: int) -> int:
        return self._bytes(numbers) if numbers >= LEAST else 8 * numbers

    def matrix(self, m: int, n: int) -> int:
        numbers = m * n
        if numbers < LEAST or numbers % self.block:
            return 8 * numbers
        return self._bytes(numbers) + 2 * 4 * 2**self.bits

    def _bytes(self, numbers: int) -> int:
        return 2 * (math.ceil(numbers * self.bits / 8) + 4 * math.ceil(numbers / self.block))

    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        try:
            theirs = importlib.import_module("torchao.optim")
        except ImportError:
            raise Invalid(f"training.optim {self.hf} needs torchao: pip install torchao, or take adamw") from None
        own = getattr(theirs, self.kind)
        return _eager(own)(groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0)


def _eager(kind: type[Any]) -> type[Any]:
    """The same class, whose steps compile nothing on a CPU, where a compiler of C may not be there."""

    class Eager(kind):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
                return super().step(closure)
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    Eager.__name__ = Eager.__qualname__ = kind.__name__
    return Eager
