"""What optimizers are unless they say otherwise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch


class Usual(ABC):
    """An optimizer whose state is that of each number, on any device. Abstract."""

    hf: ClassVar[str] = ""
    same: ClassVar[tuple[str, ...]] = ()
    label: ClassVar[str] = ""
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    smaller: ClassVar[str | None] = None
    adaptive: ClassVar[bool] = True
    alone: ClassVar[bool] = False  # does it step weights one at a time itself, so that it cannot be within another that does?
    rowwise: ClassVar[bool] = False  # does torch move a number by its own gradients alone, wherever other rows of the tensor are?
    only: ClassVar[str | None] = None  # the adapter whose tensors are all that it can step
    layerwise: bool = False

    @abstractmethod
    def state(self, numbers: int) -> int:
        """Bytes that it holds between two steps for so many trained numbers, float32 ones in large tensors."""

    def matrix(self, m: int, n: int) -> int:
        return self.state(m * n)

    @abstractmethod
    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        """The optimizer over parameters or groups of them."""


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What a step gives back: the loss that its closure computes, with gradients; None where there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
