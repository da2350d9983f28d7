"""Sparsely Shared LoRA on Whisper for Child Speech Recognition (the sparsity).  Liu et al., ICASSP 2024.  arXiv:2309.11756v2.
Use it with adapter s2_lora, whose factors all matrices of a shape share: each matrix then uses few of their directions.

Over adapters W + s·B diag(e) A the loss is joined by w ‖e‖₁ over all coefficients. Its step is taken exactly, after the optimizer's:

    e ← sign(e) max(|e| − η w, 0)

Deviations: the paper adds the norm to the loss, whose gradient under Adam makes small coefficients and never a zero; here they become
zeros, which exports leave out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run


class S2Sparsity(Rule):
    """`weight` is w.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(2, 2)), fb.Plan({"0": fb.Spec(adapter=fb.Gated(rank=1))}))
    >>> hosts = dict(fb.hosts(model))
    >>> gate = hosts["0"].p["default"]["gate"]
    >>> gate.data.fill_(3.0)
    tensor([3.])
    >>> fb.S2Sparsity(weight=10.0).after_step(fb.Run(model, hosts, torch.optim.SGD([gate], lr=0.1)))
    >>> gate.item()  # 3 − 0.1 · 10
    2.0
    """

    null: ClassVar[dict[str, Any]] = {"weight": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"gate"})

    def __init__(self, weight: float = 1e-3) -> None:
        if not weight >= 0:
            raise Invalid(f"S2Sparsity needs weight >= 0; got {weight}")
        self.weight = weight

    def factors(self, run: Run) -> dict[nn.Parameter, dict[str, float]]:
        """No decay beside the prox."""
        gates = [p["gate"] for p in family.tensors(run, self).values()] if self.weight else []
        return {gate: {"weight_decay": 0.0} for gate in gates}

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        if not self.weight:
            return
        for p in family.tensors(run, self).values():
            gate = p["gate"]
            gate.copy_(family.soft(gate, self.weight * family.rate(run, gate, "S2Sparsity")))
