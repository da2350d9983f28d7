"""MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts (the balance loss).  Li et al., 2024.
arXiv:2404.15159v3.
Use it with adapter mixlora: without it a few experts get all tokens.

    L_b = Σ_e f_e P_e · E,    f_e = tokens that go to e, as a share of all,    P_e = mean of p_e over tokens          (eq. 6, 7)

of every sublayer, with each of a token's K choices counted: K where the load is even, E where all go to the same K with all their weight.
The task's loss is joined by `weight` times the mean over sublayers. Padding is no token.
Deviations: the mean over sublayers, where the paper does not say how they are joined.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.rules.base import Rule, Run


class MixLoRABalance(Rule):
    """The `weight` of the balance loss.

    >>> fb.MixLoRABalance(weight=0.01).weight
    0.01
    """

    null: ClassVar[dict[str, Any]] = {"weight": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"router"})

    def __init__(self, weight: float = 1e-3) -> None:
        if not weight >= 0:
            raise Invalid(f"mixlora_balance needs weight >= 0; got {weight}")
        self.weight = weight
        self.inside: Tensor | None = None  # which places of the batch are tokens
        self.hook: Any = None

    def before_forward(self, run: Run) -> None:
        if not self.weight:
            return
        for host in self._routed(run):
            host.listens, host.noted = True, None
        self._unhook()
        self.hook = run.model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None:  # a call without one may be a look at the head alone, between a batch and its penalty
            self.inside = mask

    def _unhook(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.hook = None

    def _routed(self, run: Run) -> list[Any]:
        hosts = [host for host in run.hosts.values() for a in host.active if "router" in host.p[a]]
        if not hosts:
            raise Invalid("MixLoRABalance needs adapters with a router, and the model has none: plan with adapter mixlora")
        return hosts

    def penalty(self, run: Run) -> Tensor | float:
        if not self.weight:
            return 0.0
        losses = [self._balance(*host.noted) for host in self._routed(run) if host.noted is not None]
        self.inside = None
        for host in self._routed(run):
            host.noted = None
        return self.weight * torch.stack(losses).mean() if losses else 0.0

    def _balance(self, probabilities: Tensor, to: Tensor) -> Tensor:
        p, f = probabilities.flatten(0, -2), to.flatten(0, -3).sum(1).to(probabilities.dtype)  # (tokens, E) each
        if self.inside is not None and self.inside.numel() == len(p):
            keep = self.inside.flatten().to(p.device, p.dtype)[:, None]
            p, f = p * keep / keep.mean(), f * keep / keep.mean()
        return p.shape[-1] * (f.mean(0) * p.mean(0)).sum()

    def after_backward(self, run: Run) -> None:
        self._unhook()
        for host in self._routed(run) if self.weight else []:
            host.listens, host.noted = False, None
