"""EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models (scale-aware rates).  He et al., ICLR 2024.
Use it with efficientdm or l4q where layers' weights differ much in size: at one rate those of wide steps never change a code.

    η_ℓ = η · (Δ_ℓ / mean_ℓ Δ_ℓ)^power,    Δ_ℓ the mean step of the layer                                    (of A and B; power 1)

Deviations: the paper's rate is Δ_ℓ/2500 whatever the run's; here the layers share the run's rate, its schedule and the factors of other rules.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run


class ScaleAwareRates(Rule):
    """`power` is that of a layer's step; 0 leaves all rates alike.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 64)).requires_grad_(False)
    >>> model[0].weight.data, model[1].weight.data = torch.ones(8, 64), 3 * torch.ones(64, 8)
    >>> model = fb.build(model, fb.Plan({n: fb.Spec(adapter=fb.EfficientDM(rank=2)) for n in "01"}))
    >>> factors = fb.ScaleAwareRates().factors(fb.Run(model, dict(fb.hosts(model))))
    >>> [round(factors[model[i].p["default"]["B"]]["lr"], 2) for i in (0, 1)]
    [0.5, 1.5]
    """

    null: ClassVar[dict[str, Any]] = {"power": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"A", "B", "log_scale"})

    def __init__(self, power: float = 1.0) -> None:
        if not power >= 0:
            raise Invalid(f"ScaleAwareRates needs a power of at least 0; got {power}")
        self.power = power

    def factors(self, run: Run) -> dict[nn.Parameter, dict[str, float]]:
        tensors = family.tensors(run, self)
        step = {name: float(p["log_scale"].detach().exp().mean()) for name, p in tensors.items()}
        mean = sum(step.values()) / len(step)
        return {p[k]: {"lr": (step[name] / mean) ** self.power} for name, p in tensors.items() for k in ("A", "B")}
