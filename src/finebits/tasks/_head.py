"""The way from states to outputs: a matrix, a bias, a scale, a cap.

z = W h + b,    outputs = a z    or    c tanh(a z / c)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finebits.build import Adapted
from finebits.lookup import is_linear
from finebits.losses import each_cross_entropy, shaped


@dataclass(frozen=True, eq=False)
class Head:
    """`module` computes W h + b, whatever its class."""

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @property
    def frozen_product(self) -> bool:
        """Is it one product with a frozen matrix? Then the gradient of the states is found without autograd."""
        plain = is_linear(self.module) or (isinstance(self.module, Adapted) and not self.module.active)
        return plain and not any(p.requires_grad for p in self.module.parameters())

    @property
    def copies(self) -> int:
        """Float32 numbers an output that are there at a time while the loss is computed."""
        return 4 if not self.frozen_product else 1 if self.cap is None else 2

    def __call__(self, states: Float[Tensor, "*b h"]) -> Float[Tensor, "*b v"]:
        """Outputs in float32, multiplied in the head's own dtype; differentiable."""
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), states.dtype)
        return self.shape(self.module(states.to(dtype)).float())

    def shape(self, z: Tensor) -> Tensor:
        """Scale and cap; in place where no gradient is wanted."""
        return shaped(z, self.scale, self.cap)

    def loss(self, states: Float[Tensor, "p h"], labels: Int[Tensor, " p"], chunk: int = 256, smoothing: float = 0.0) -> Float[Tensor, ""]:
        """Sum of −log p(label), smoothed by ε. Never more than `chunk` places have outputs.

        Gradients reach the states and whatever of the head is trained: through autograd, a chunk at a time, where something is."""
        return self.each(states, labels, chunk, smoothing).sum()

    def each(
        self, states: Float[Tensor, "p h"], labels: Int[Tensor, " p"], chunk: int = 256, smoothing: float = 0.0
    ) -> Float[Tensor, " p"]:
        """The same of every place."""
        if self.frozen_product:
            module: Any = self.module
            how = {"bias": module.bias, "scale": self.scale, "cap": self.cap, "smoothing": smoothing}
            return each_cross_entropy(states, module.weight, labels, chunk, **how)

        def part(h: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self(h), y, reduction="none", label_smoothing=smoothing)

        parts = [checkpoint(part, h, y, use_reentrant=False) for h, y in zip(states.split(chunk), labels.split(chunk), strict=True)]
        return (states * 0).sum(-1).float() + torch.cat(parts) if len(states) else (states * 0).sum(-1).float()


@contextlib.contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while; one that was laid over the class's own comes back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
