"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning.  Zhang et al., ICLR 2023.  arXiv:2303.10512v2.
Use it where ranks are to be small on average and matrices differ: all start at full rank, and the least important directions are closed.

Over adapters W + s·B diag(λ) A (the paper's P Λ Q), keeps the b(t) most important triplets (B_·i, λ_i, A_i·) of all layers together:

    I(w)   = |w · ∂L/∂w|                                             (sensitivity, eq. 8)
    Ī      ← β₁ Ī + (1 − β₁) I,    Ū ← β₂ Ū + (1 − β₂) |I − Ī|       (eqs. 9, 10)
    s(w)   = Ī · Ū                                                   (eq. 11)
    S_i    = s(λ_i) + mean_j s(B_ji) + mean_j s(A_ij)                (eq. 7)
    λ_i    ← λ_i if S_i is among the b(t) largest, else 0            (eq. 5)
    b(t)   = b⁰ for t < t_i;  b^T + (b⁰ − b^T)(1 − (t − t_i)/(T − t_i − t_f))³;  b^T for t ≥ T − t_f       (eq. 12)
    loss  += γ Σ (‖Bᵀ B − I‖² + ‖A Aᵀ − I‖²)                         (eq. 4)

Deviations:
- the penalty is the mean over factors of the unsquared norm, as in the authors' code, so that γ does not depend on the number of layers;
- the b(t) largest are picked exactly, ties by module name and index, where the authors cut at the k-th value; b(t) counts to its floor;
- the cut at T − t_f goes by the scores of that step, where the authors stop watching one step before;
- closed λ are zeroed after every step, not every ΔT steps, so that what is exported is what was last evaluated.
The sensitivity is taken after the optimizer's step, as in the authors' code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run, Scene


class AdaLoRA(Rule):
    """Budget falls from every gate to `target_rank` per host on average; `warmup` = t_i, `final` = t_f in steps, `every` = ΔT.

    >>> rule = fb.AdaLoRA(warmup=10, final=10)
    >>> [rule.budget(step, total=100, full=16, target=4) for step in (0, 50, 90)]  # half way: 4 + 12/2³, rounded down
    [16, 5, 4]
    """

    null: ClassVar[dict[str, Any]] = {"target_rank": 2**31, "orthogonal": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate"})

    def __init__(
        self,
        target_rank: int = 8,
        warmup: int = 0,
        final: int = 0,
        every: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonal: float = 0.1,
    ) -> None:
        self.target_rank, self.warmup, self.final, self.every = target_rank, warmup, final, every
        self.beta1, self.beta2, self.orthogonal = beta1, beta2, orthogonal
        self.mean: dict[str, Tensor] = {}  # Ī
        self.spread: dict[str, Tensor] = {}  # Ū
        self.open: dict[str, Tensor] = {}  # gates that are open, by host

    def budget(self, step: int, total: int, full: int, target: int) -> int:
        """b(t), in triplets over all hosts."""
        if step < self.warmup:
            return full
        if step >= total - self.final:
            return target
        left = 1 - (step - self.warmup) / (total - self.final - self.warmup)
        return int(target + (full - target) * left**3)

    def state(self, scene: Scene) -> int:
        return sum(8 * on.numbers("A", "B", "gate") + on.numbers("gate") for on in scene.adapters)

    def work(self, scene: Scene) -> int:
        return family.departures(scene) if self.orthogonal else 0

    def penalty(self, run: Run) -> Tensor | float:
        if not self.orthogonal:
            return 0.0
        terms = [family.departure(P) for p in family.tensors(run, self).values() for P in (p["A"], p["B"].mT)]
        return self.orthogonal * torch.stack(terms).mean()

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        gated = family.tensors(run, self)
        self.watch(gated)
        full = sum(p["gate"].numel() for p in gated.values())
        keep = self.budget(run.step, run.total, full, min(full, self.target_rank * len(gated)))
        if not self.open:
            self.open = {name: torch.ones_like(p["gate"], dtype=torch.bool) for name, p in gated.items()}
        if run.step % self.every == 0 and run.step < max(run.total - self.final, 1) or run.step == run.total - self.final:
            score = torch.cat([self.scores(name, p) for name, p in sorted(gated.items())])
            on = torch.zeros_like(score, dtype=torch.bool)
            on[torch.sort(score, descending=True, stable=True).indices[:keep]] = True
            sizes = [p["gate"].numel() for _, p in sorted(gated.items())]
            self.open = dict(zip(sorted(gated), on.split(sizes), strict=True))
        for name, p in gated.items():
            p["gate"].mul_(self.open[name])

    def watch(self, gated: dict[str, dict[str, nn.Parameter]]) -> None:
        """Ī and Ū of every weight; a closed gate has just moved off zero, so that it can be missed and come back."""
        for name, p in gated.items():
            for k in ("A", "B", "gate"):
                w = p[k]
                if w.grad is None:
                    raise Invalid(f"AdaLoRA found no gradient for {name}.{k}: every gated adapter must be trained")
                sensitivity = (w * w.grad).abs()
                mean = self.mean.setdefault(f"{name}.{k}", torch.zeros_like(w)).lerp_(sensitivity, 1 - self.beta1)
                self.spread.setdefault(f"{name}.{k}", torch.zeros_like(w)).lerp_((sensitivity - mean).abs(), 1 - self.beta2)

    def scores(self, name: str, p: dict[str, nn.Parameter]) -> Tensor:
        """S_i of every triplet of one adapter."""
        s = {k: self.mean[f"{name}.{k}"] * self.spread[f"{name}.{k}"] for k in ("A", "B", "gate")}
        return s["gate"] + s["A"].mean(1) + s["B"].mean(0)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "spread": self.spread, "open": self.open}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.spread, self.open = ({k: v.clone() for k, v in state[name].items()} for name in ("mean", "spread", "open"))
