"""LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization.  Chang et al., 2025.
arXiv:2502.14538v1.
Use it where lora of a high rank overfits: flat minima in one pass, without the second one of sharpness-aware minimization.

While training, and only then, the weight W′ = W + L R of every adapted layer is W′ + ε, anew in every step:

    ε_ij ~ N(0, (σ²/n) (‖W′_i‖² + β ‖g_i‖²)),    E‖ε_i‖² = σ² (‖W′_i‖² + β ‖g_i‖²)

for row i. g stands for ∂L/∂W′, which nobody has: it is (∂L) R + L (∂R) of the step before, with the gradients that the adapter got, which for
lora is s (∂L/∂B A + B ∂L/∂A) = s² (G Aᵀ A + B Bᵀ G).
`noise` is "weight": one ε a step, drawn from (seed, step, layer), so that micro-batches, recomputed blocks and all processes see the same,
drawn again on the way back instead of being kept; or "output": of the same variance but drawn for every token anew, which takes no matrix.
Deviations: arXiv v2 and v3 of this number are another method (rule `mgpo`); gradients are those after clipping.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Form
from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run, Scene


class GGPO(Rule):
    """σ and β; norms of weights are taken every `every` steps.

    >>> rule = fb.GGPO(sigma=0.5, beta=3.0)
    >>> rule.deviation(torch.tensor([1.0]), torch.tensor([1.0]), n=4)  # ½ √((1 + 3 · 1) / 4)
    tensor([0.5000])
    """

    null: ClassVar[dict[str, Any]] = {"sigma": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    forms: ClassVar[frozenset[Form]] = frozenset({"product"})

    def __init__(
        self, sigma: float = 0.03, beta: float = 0.01, noise: Literal["weight", "output"] = "weight", every: int = 1, seed: int = 0
    ) -> None:
        if not (sigma >= 0 and beta >= 0 and every >= 1):
            raise Invalid(f"GGPO needs sigma >= 0, beta >= 0 and every >= 1; got {sigma}, {beta} and {every}")
        if noise not in ("weight", "output"):
            raise Invalid(f"GGPO's noise is of the weight or of the output, not {noise!r}")
        self.sigma, self.beta, self.noise, self.every, self.seed = sigma, beta, noise, every, seed
        self.weights: dict[str, Tensor] = {}  # ‖W′_i‖²
        self.gradients: dict[str, Tensor] = {}  # ‖g_i‖²
        self.span = contextlib.ExitStack()

    def deviation(self, weights: Float[Tensor, " m"], gradients: Float[Tensor, " m"], n: int) -> Float[Tensor, " m"]:
        """Of the entries of row i."""
        return self.sigma * ((weights + self.beta * gradients) / n).sqrt()

    def state(self, scene: Scene) -> int:
        return sum((8 if self.beta else 4) * on.m for on in scene.adapters) if self.sigma else 0

    def work(self, scene: Scene) -> int:
        """Deviations of all rows; where one is drawn, the noise of the largest weight, once before it is scaled and once after."""
        if not self.sigma:
            return 0
        drawn = max((8 * on.m * on.n for on in scene.adapters), default=0) if self.noise == "weight" else 0
        return drawn + sum(4 * on.m for on in scene.adapters)

    @torch.no_grad()
    def before_forward(self, run: Run) -> None:
        self.span.close()
        for name, host, _, _ in family.adapters(run, self) if self.sigma else ():
            if run.step % self.every == 0 or name not in self.weights:
                self.weights[name] = host.stack(torch.float32).weight.square().sum(1)
            weights = self.weights[name].to(host.weight.device)
            gradients = self.gradients.get(name, torch.zeros_like(weights)).to(weights.device)
            scale = self.deviation(weights, gradients, host.weight.shape[1])
            if self.noise == "weight":
                seed = family.generator(self.seed, f"{name}/{run.step}").initial_seed()
                family.adding(self.span, host, lambda x, out, scale=scale, seed=seed: Noise.apply(x, scale, seed).to(out.dtype))
            else:
                family.adding(self.span, host, lambda x, out, scale=scale: _by_token(x, out, scale))

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        self.span.close()
        for name, _, adapter, p in family.adapters(run, self) if self.sigma and self.beta else ():
            got = {k: t.grad for k, t in p.items() if t.grad is not None}
            self.gradients[name] = family.squares(*family.tangent(adapter, p, got))

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "gradients": self.gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.gradients = ({k: v.clone() for k, v in state[name].items()} for name in ("weights", "gradients"))


def _by_token(x: Tensor, out: Tensor, scale: Float[Tensor, " m"]) -> Tensor:
    """N(0, scale² ‖x‖²) for every output of every token."""
    norms = x.detach().float().norm(dim=-1, keepdim=True)
    return (torch.randn(out.shape, device=out.device) * scale * norms).to(out.dtype)


class Noise(torch.autograd.Function):
    """x εᵀ, with ε drawn from its seed forwards and again backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, seed: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(scale)
        ctx.rest = seed, x.shape[-1]
        return x @ drawn(scale, seed, x.shape[-1]).to(x.dtype).mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (scale,), (seed, n) = ctx.saved_tensors, ctx.rest
        return grads[0] @ drawn(scale, seed, n).to(grads[0].dtype), None, None


def drawn(scale: Float[Tensor, " m"], seed: int, n: int) -> Float[Tensor, "m n"]:
    """ε, whose row i has deviation scale_i."""
    gen = torch.Generator(scale.device).manual_seed(seed)
    return torch.randn(len(scale), n, generator=gen, device=scale.device) * scale[:, None]
