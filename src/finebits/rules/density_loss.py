"""From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers.  Runwal, Pedapati & Chen, AAAI 2025.
arXiv:2402.01911v2.
Use it where the trained model is to be served sparsely: activations of MLPs that are almost zero are pushed the rest of the way.

With h what an activation function (ReLU, GELU, SiLU, …) gives for the tokens of a batch, padding left out:

    L += w · mean over MLPs of mean(h² / (h² + ε))

a smooth count of what is not zero. Its pull is 2 h ε / (h² + ε)², largest at h = √(ε/3): a small ε finishes off what is almost zero, a
larger one moves more.
Deviations: padding is left out, where the authors' code counts it; h is squared in float32, where 1e-7 is not lost. (PEFT has an adapter of
the name DEFT, which is another method.)
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.rules.base import Rule, Run, Scene

FILES = ("torch.nn.modules.activation", "transformers.activations")  # that hold activation functions
OTHERS = ("Tanh", "Sigmoid", "Softmax", "Softmin", "LogSoftmax", "LogSigmoid", "MultiheadAttention")  # that make no zeros, or are none


class DensityLoss(Rule):
    """`weight` is w.

    >>> fb.DensityLoss(eps=0.01).density(torch.tensor([0.0, 0.1, 100.0])).round(decimals=4)  # nothing, half and all of a count
    tensor([0.0000, 0.5000, 1.0000])
    """

    null: ClassVar[dict[str, Any]] = {"weight": 0.0}

    def __init__(self, weight: float = 1.0, eps: float = 1e-7) -> None:
        if not (weight >= 0 and eps > 0):
            raise Invalid(f"DensityLoss needs weight >= 0 and eps above 0; got {weight} and {eps}")
        self.weight, self.eps = weight, eps
        self.mask: Tensor | None = None  # of the tokens of the batch that is in the model
        self.seen: list[Tensor] = []  # the density of every MLP
        self.looking = False  # not at blocks that are computed again on the way back
        self.span = contextlib.ExitStack()

    def density(self, h: Tensor) -> Tensor:
        """h² / (h² + ε), entry by entry."""
        square = h.float().square()
        return square / (square + self.eps)

    def suit(self, model: nn.Module) -> None:
        self._activations(model)

    def per_token(self, scene: Scene) -> int:
        """h in float32 where it is not yet, h² and h² + ε."""
        return sum((8 if scene.width == 4 else 12) * units for units in scene.units) if self.weight else 0

    def _activations(self, model: nn.Module) -> dict[str, Any]:
        found = {name: m for name, m in model.named_modules() if type(m).__module__ in FILES and type(m).__name__ not in OTHERS}
        if not found:
            what = f"and {type(model).__name__} has none: leave the rule out"
            raise Invalid(f"DensityLoss looks at modules that are activation functions (ReLU, GELU, SiLU, …), {what}")
        return found

    def before_forward(self, run: Run) -> None:
        self.span.close()
        if not self.weight:
            return
        found = self._activations(run.model)
        for handle in (
            run.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(m.register_forward_hook(lambda m, inputs, h, name=name: self._see(name, h)) for name, m in found.items()),
        ):
            self.span.callback(handle.remove)

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.looking = True

    def _see(self, name: str, h: Tensor) -> None:
        if not torch.is_grad_enabled():
            raise Invalid(f"DensityLoss wants the gradient of {name}, and it is computed without: checkpoint with use_reentrant=False")
        density = self.density(h)  # computed again too, where the block is: it must be the same block
        if self.mask is not None:
            tokens = self.mask.to(h.device)
            mask = tokens if h.shape[:2] == tokens.shape else tokens.flatten()
            if h.shape[: mask.ndim] != mask.shape:
                raise Invalid(
                    f"DensityLoss cannot tell the padding in {name}, which gives {tuple(h.shape)} for tokens {tuple(tokens.shape)}"
                )
            density = density[mask]
        mean = density.mean()
        if self.looking:
            self.seen.append(mean)

    def penalty(self, run: Run) -> Tensor | float:
        if not self.weight:
            return 0.0
        if not self.seen:
            raise Invalid("DensityLoss saw no activations: the loss must come of a forward through the whole model")
        seen, self.seen, self.looking = self.seen, [], False
        return self.weight * torch.stack(seen).mean()

    def after_backward(self, run: Run) -> None:
        self.span.close()
        self.mask = None
