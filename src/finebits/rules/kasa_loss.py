"""KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models (the loss).  Wang et al., ICLR 2025.  arXiv:2412.06071v2.
Use it with init kasa: it keeps singular values small and factors near orthonormal.

Over adapters W + s·B diag(σ) A, which init `kasa` starts, the task's loss is joined by a penalty on the trained singular values and one on
factors that are not orthonormal, B for the paper's ΔU and A for its ΔVᵀ:

    L = L₁ + β L₂ + γ L₃,    L₂ = Σ_l ‖σ_l‖²,    L₃ = Σ_l (‖B_lᵀ B_l − I‖ + ‖A_l A_lᵀ − I‖)

Deviations: L₃ follows the paper; the authors' code takes the products on the other side (B Bᵀ, Aᵀ A), which no factor of low rank can bring
near to I, and divides both sums by the number of layers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run, Scene


class KaSALoss(Rule):
    """β and γ; the authors tune both by task, from 1e-5 to 1.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(2, 2)), fb.Plan({"0": fb.Spec(adapter=fb.Gated(rank=1))}))
    >>> hosts = dict(fb.hosts(model))
    >>> with torch.no_grad():
    ...     gate = hosts["0"].p["default"]["gate"].fill_(3.0)
    >>> fb.KaSALoss(beta=1.0, gamma=0.0).penalty(fb.Run(model, hosts)).item()  # 3²
    9.0
    """

    null: ClassVar[dict[str, Any]] = {"beta": 0.0, "gamma": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate"})

    def __init__(self, beta: float = 1e-4, gamma: float = 1e-3) -> None:
        if not (beta >= 0 and gamma >= 0):
            raise Invalid(f"KaSALoss needs beta >= 0 and gamma >= 0; got beta {beta} and gamma {gamma}")
        self.beta, self.gamma = beta, gamma

    def work(self, scene: Scene) -> int:
        return family.departures(scene) if self.beta or self.gamma else 0

    def penalty(self, run: Run) -> Tensor | float:
        if not (self.beta or self.gamma):
            return 0.0
        adapters = family.tensors(run, self).values()
        L2 = torch.stack([p["gate"].square().sum() for p in adapters]).sum()
        L3 = torch.stack([family.departure(p["B"].mT) + family.departure(p["A"]) for p in adapters]).sum()
        return self.beta * L2 + self.gamma * L3
